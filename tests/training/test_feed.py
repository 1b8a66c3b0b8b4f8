import jax
import numpy as np
import pytest

from electrax.data.batches import train_rows
from electrax.training.feed import fits_device, host_feed, resident_feed
from electrax.training.sharding import MeshConfig, make_mesh

TABLE = np.arange(10 * 3, dtype=np.uint16).reshape(10, 3)  # row r holds 3r, 3r + 1, 3r + 2


def numbers(step):
    return train_rows(step, 4, len(TABLE), seed=1)


def read(step, rows):
    return {"ids": TABLE[numbers(step)[rows]]}


def mesh_of(devices):
    return make_mesh(MeshConfig(), jax.devices()[:devices])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("count", [1, 3])  # steps 1 to 3 pass into the next epoch
def test_rows_on_the_device_make_the_batches_of_the_host(devices, count):
    mesh = mesh_of(devices)
    from_host = host_feed(read, 4, mesh)(1, count)["ids"]
    gathered = resident_feed(TABLE, numbers, 4, mesh)(1, count)["ids"]
    expected = TABLE[np.stack([numbers(step) for step in range(1, 1 + count)])]
    np.testing.assert_array_equal(from_host, expected[0] if count == 1 else expected)
    np.testing.assert_array_equal(gathered, from_host)
    assert gathered.dtype == from_host.dtype == np.uint16
    assert gathered.sharding.is_equivalent_to(from_host.sharding, from_host.ndim)


class Device:
    def __init__(self, platform, memory):
        self.platform, self._memory = platform, memory

    def memory_stats(self):
        return self._memory


@pytest.mark.parametrize(
    ("device", "size", "fits"),
    [
        (Device("gpu", {"bytes_limit": 1000}), 100, True),
        (Device("gpu", {"bytes_limit": 1000}), 101, False),
        (Device("tpu", None), 1, False),  # it does not say how much it has
        (Device("cpu", {"bytes_limit": 1000}), 1, False),
    ],
)
def test_an_accelerator_keeps_rows_that_take_a_tenth_of_its_memory(device, size, fits):
    assert fits_device(size, device) is fits
