"""Batches on their way to the devices: read on the host step by step, or gathered from rows that the devices hold."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int64, Shaped

from electrax.tasks.base import Batch
from electrax.training.sharding import batch_sharding, local_rows, put_batch, put_everywhere

Feed = Callable[[int, int], Batch]  # (step, n) -> the batch of that step, or with n > 1 of n steps, stacked
RESIDENT_SHARE = 0.1  # of an accelerator's memory that rows may take


def host_feed(read: Callable[[int, slice], Batch], batch_size: int, mesh: Mesh) -> Feed:
    """Batches as a task's `train_batch` reads them."""
    rows = local_rows(batch_size, mesh)

    def feed(step: int, count: int) -> Batch:
        if count == 1:
            return put_batch(read(step, rows), mesh)
        batches = [read(number, rows) for number in range(step, step + count)]
        return put_batch(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), mesh, leading=1)

    return feed


def resident_feed(
    table: Shaped[np.ndarray, "N L"], numbers: Callable[[int], Int64[np.ndarray, " B"]], batch_size: int, mesh: Mesh
) -> Feed:
    """The rows `numbers(step)` of a table that every device holds: only the numbers leave the host. `ids` [B, L] as
    they come from `host_feed`."""
    rows = local_rows(batch_size, mesh)
    held = put_everywhere(table, NamedSharding(mesh, P()))
    gather = [jax.jit(lambda table, row: table[row], out_shardings=batch_sharding(mesh, leading)) for leading in (0, 1)]

    def feed(step: int, count: int) -> Batch:
        wanted = np.stack([numbers(number)[rows] for number in range(step, step + count)]).astype(np.int32)
        row = put_batch({"row": wanted[0] if count == 1 else wanted}, mesh, leading=int(count > 1))["row"]
        return {"ids": gather[count > 1](held, row)}

    return feed


def fits_device(size: int, device: Any) -> bool:
    """Whether so many bytes are worth keeping on each device: never on a CPU, whose memory the host reads as well."""
    if device.platform == "cpu":
        return False
    return size <= RESIDENT_SHARE * (device.memory_stats() or {}).get("bytes_limit", 0)
