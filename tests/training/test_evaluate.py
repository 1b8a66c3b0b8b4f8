import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.tasks.base import Mean
from electrax.training.evaluate import make_evaluate
from electrax.training.sharding import MeshConfig, make_mesh


class Numbers:
    """Held-out row r holds the number r; rows below 2 weigh nothing."""

    def __init__(self, rows, batch_size):
        self.rows, self.batch_size = rows, batch_size

    def eval_batches(self, rows):
        for start in range(0, self.rows, self.batch_size):
            numbers = np.arange(start, start + self.batch_size)
            numbers = np.where(numbers < self.rows, numbers, -1)[rows]
            yield {"ids": np.maximum(numbers, 0)[:, None], "real": numbers >= 0}, numbers

    def prepare(self, batch, keys):
        return batch | {"noise": jax.vmap(jax.random.uniform)(keys)}

    def evaluate(self, params, prepared):
        ids, real = prepared["ids"][:, 0], prepared["real"]
        metrics = {
            "mean": Mean.of(params["scale"] * ids, real & (ids >= 2)),
            "noise": Mean.of(prepared["noise"], real),
            "none": Mean.of(ids, jnp.zeros_like(real)),
        }
        return metrics, {"id": ids, "noise": prepared["noise"]}

    def summarize(self, means, arrays):
        return means | {"rows": float(len(arrays["id"]))}

    def init(self, key, batch): ...
    def loss(self, params, prepared): ...
    def score(self, figures): ...
    def train_batch(self, step, rows): ...


def mesh_of(devices):
    return make_mesh(MeshConfig(), jax.devices()[:devices])


@pytest.mark.parametrize(("batch_size", "devices"), [(2, 1), (3, 1), (5, 1), (8, 1), (4, 4), (8, 8)])
def test_every_row_counts_once_in_order_whatever_the_batches_and_devices(batch_size, devices):
    evaluate = make_evaluate(Numbers(5, batch_size), mesh_of(devices))
    figures, arrays = evaluate({"scale": jnp.float32(2.0)})
    assert figures["mean"] == (4 + 6 + 8) / 3
    assert figures["rows"] == 5
    assert np.isnan(figures["none"])
    assert arrays["id"].tolist() == [0, 1, 2, 3, 4]
    # the key of row r is fold_in(key(0), r)
    noise = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), row))) for row in range(5)]
    np.testing.assert_array_equal(arrays["noise"], np.float32(noise))
    assert figures["noise"] == pytest.approx(np.mean(noise), rel=1e-6)


class OutOfOrder(Numbers):
    """Rows in another order, in batches of two lengths."""

    def eval_batches(self, rows):
        for place, numbers in enumerate([[4, 1], [-1, 0], [2, 3]]):
            numbers = np.array(numbers)
            ids = np.repeat(np.maximum(numbers, 0)[:, None], 1 + place % 2, axis=1)
            yield {"ids": ids, "real": numbers >= 0}, numbers


def test_arrays_come_in_the_order_of_the_rows_whatever_the_order_and_length_of_the_batches():
    params, mesh = {"scale": jnp.float32(2.0)}, mesh_of(1)
    figures, arrays = make_evaluate(OutOfOrder(5, 2), mesh)(params)
    expected, plain = make_evaluate(Numbers(5, 2), mesh)(params)
    assert arrays["id"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(arrays["noise"], plain["noise"])
    assert set(arrays) == {"id", "noise"}
    assert figures == pytest.approx(expected, nan_ok=True)


# -- of a real task ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params(tiny):
    task = tiny.task()
    return jax.device_get(task.init(jax.random.key(3), tiny.batch(task, 0)))


def evaluate(tiny, params, mesh=None, **changes):
    return make_evaluate(tiny.task(**changes), mesh or tiny.mesh())(params)


@pytest.fixture(scope="module")
def reference(tiny, params):
    """All held-out rows in one batch, so that no row fills it up."""
    return evaluate(tiny, params, batch_size=tiny.corpus.size("valid"))


def brute_force_auc(score, positive):
    """Wins of each replaced over each original token; a tie is half a win."""
    difference = score[positive][:, None] - score[~positive][None]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def test_the_reference_counts_every_held_out_token_once(tiny, reference):
    figures, arrays = reference
    rows = tiny.corpus.rows("valid", np.arange(tiny.corpus.size("valid")))
    np.testing.assert_array_equal(arrays["ids"], rows)
    replaced = (arrays["corrupted"] != rows)[arrays["real"]]
    assert figures["replaced_share"] == pytest.approx(replaced.mean(), rel=1e-6)
    assert figures["rtd_auc"] == pytest.approx(brute_force_auc(arrays["score"][arrays["real"]], replaced), abs=1e-12)


@pytest.mark.parametrize("batch_size", [6, 8])
def test_the_figures_do_not_depend_on_the_batch_size(tiny, params, reference, batch_size):
    assert tiny.corpus.size("valid") % batch_size
    figures, arrays = evaluate(tiny, params, batch_size=batch_size)
    assert figures == pytest.approx(reference[0], rel=1e-5)
    np.testing.assert_array_equal(arrays["corrupted"], reference[1]["corrupted"])


def test_the_figures_do_not_depend_on_the_devices(tiny, params, reference):
    figures, arrays = evaluate(tiny, params, tiny.mesh(2, 2, 2))
    assert figures == pytest.approx(reference[0], rel=1e-5)
    np.testing.assert_array_equal(arrays["corrupted"], reference[1]["corrupted"])


def test_the_figures_do_not_depend_on_the_seed_of_the_run_and_repeat_to_the_bit(tiny, params):
    first, second = evaluate(tiny, params, seed=1), evaluate(tiny, params, seed=2)
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1]["score"], second[1]["score"])


def test_as_many_rows_are_used_as_asked_for(tiny, params, reference):
    figures, arrays = evaluate(tiny, params, eval={"rows": 5})
    assert arrays["ids"].shape == (5, 32)
    np.testing.assert_array_equal(arrays["corrupted"], reference[1]["corrupted"][:5])
