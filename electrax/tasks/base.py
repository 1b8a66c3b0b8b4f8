"""What the loop knows of an objective."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Params = dict[str, Any]
Batch = dict[str, Any]  # name -> array whose first axis is the row


class Mean(NamedTuple):
    """A mean kept as its parts, so that adding the parts over batches and devices gives the exact overall mean."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @staticmethod
    def of(values: jax.Array, weights: jax.Array) -> "Mean":
        weights = weights.astype(jnp.float32)
        return Mean(jnp.sum(values * weights), jnp.sum(weights))

    def value(self) -> float:
        """NaN where nothing was counted."""
        return float(self.total) / float(self.weight) if float(self.weight) else float("nan")


Metrics = dict[str, Mean]


@runtime_checkable
class Task(Protocol):
    """An objective: a frozen dataclass without state.

    `loss` is a plain sum over the rows of what `prepare` returns: `prepare` sees the whole batch, draws what is random
    for each row from that row's key, and scales each row's weights by the batch's totals. So any cut of the prepared
    batch into micro-batches or devices adds up to the same loss and gradient.
    """

    batch_size: int

    def init(self, key: Key[Array, ""], batch: Batch) -> Params: ...

    def prepare(self, batch: Batch, keys: Key[Array, "B"]) -> Batch: ...

    def loss(self, params: Params, prepared: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Training mode. The metrics' means are summed over the rows given, like the loss."""
        ...

    def evaluate(self, params: Params, prepared: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        """Deterministic. Means, and arrays by row for what is no mean (an area under a curve, predictions)."""
        ...

    def summarize(self, means: dict[str, float], arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """The figures of an evaluation from its means and from the arrays of all its rows."""
        ...

    def score(self, figures: dict[str, float]) -> float:
        """Which of two evaluations is better: the higher. The best checkpoint is kept."""
        ...

    def train_batch(self, step: int, rows: slice) -> Batch:
        """Those rows of one step's batch, numpy: a function of the step (and the run's seed) alone."""
        ...

    def eval_batches(self, rows: slice) -> Iterator[tuple[Batch, Int[np.ndarray, "B"]]]:
        """Every held-out row once, with the rows' numbers, -1 for those that only fill the last batch."""
        ...
