"""Exact figures over all held-out rows, whatever the batch size and the devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from electrax.tasks.base import Params, Task
from electrax.training.sharding import batch_sharding, local_rows, put_batch

SEED = 0  # row r of the held-out rows always gets the key fold_in(key(SEED), r)


def make_evaluate(task: Task, mesh: Mesh) -> Callable[[Params], tuple[dict[str, float], dict[str, np.ndarray]]]:
    """A function params -> (figures, arrays in the order of the rows), the same for every batch size and seed."""

    def evaluate_batch(params, batch):
        batch = dict(batch)
        row = batch.pop("row")
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(SEED), jnp.maximum(number, 0)))(row)
        prepared = jax.lax.with_sharding_constraint(task.prepare(batch, keys), batch_sharding(mesh))
        metrics, by_row = task.evaluate(params, prepared)
        return metrics, {**by_row, "row": row}

    # replicated results can be read in every process
    compiled = jax.jit(evaluate_batch, out_shardings=NamedSharding(mesh, P()))

    def evaluate(params: Params) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        totals: dict[str, np.ndarray] = {}
        arrays: dict[str, list[np.ndarray]] = {}
        for batch, numbers in task.eval_batches(local_rows(task.batch_size, mesh)):
            placed = put_batch(batch | {"row": numbers.astype(np.int32)}, mesh)
            metrics, by_row = jax.device_get(compiled(params, placed))
            for name, mean in metrics.items():
                totals[name] = totals.get(name, 0.0) + np.asarray([mean.total, mean.weight], np.float64)
            is_real = by_row["row"] >= 0
            for name, values in by_row.items():
                arrays.setdefault(name, []).append(np.asarray(values)[is_real])
        means = {name: float(total / weight) if weight else float("nan") for name, (total, weight) in totals.items()}
        joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
        order = np.argsort(joined.pop("row"))
        joined = {name: values[order] for name, values in joined.items()}
        return task.summarize(means, joined), joined

    return evaluate
