"""The steps since the last log line: their means, and what is to be told of single ones."""

import collections
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from electrax.config import UserError
from electrax.training.tracking import Record

SPIKE_STEPS, SPIKE_SPREADS = 100, 12  # a spike: above the median of the last steps by so many median deviations


class NonFiniteLoss(UserError):
    """The loss or its gradient was NaN or infinite in too many steps in a row."""


class Window:
    """Results of the steps since the last log line, left on the device until the line is due."""

    def __init__(self, step: int, max_skipped: int):
        self.first, self.results, self.opened = step, [], time.perf_counter()
        self.max_skipped, self.skipped = max_skipped, 0  # the last steps, in a row
        self.losses: collections.deque[float] = collections.deque(maxlen=SPIKE_STEPS)

    def add(self, loss: jax.Array, metrics: Any) -> None:
        """Those of a step, or of several that were taken in one call, stacked. They leave the device as soon as they
        are there: asked for later, an accelerator would first finish the calls made in between."""
        for leaf in jax.tree.leaves((loss, metrics)):
            leaf.copy_to_host_async()
        self.results.append((loss, metrics))

    def start(self) -> None:
        """Before its first step nothing counts: what other runs did since is not this one's training time."""
        if not self.results:
            self.reopen()

    def reopen(self) -> None:
        """Time goes on counting: evaluation and saving are not training time."""
        self.opened = time.perf_counter()

    def wait(self) -> None:
        """Until all calls but the last are over; JAX alone would let the host run tens of calls ahead."""
        if len(self.results) > 1:
            jax.block_until_ready(self.results[-2][0])

    def finished(self) -> float | None:
        """The time, if all steps so far are over."""
        return time.perf_counter() if self.results and self.results[-1][0].is_ready() else None

    def close(self, step: int, finished: float | None = None) -> Iterator[Record]:
        """The means over the window as a log record after `step` updates; nothing if no step is in it. Its steps were
        over when `finished` says, or else when their results are there."""
        if not self.results:
            return
        results = [each for taken in jax.device_get(self.results) for each in _apart(*taken)]
        closed = finished or time.perf_counter()
        done = []  # steps with an update
        for offset, (loss, metrics) in enumerate(results):
            alarm = self._alarm(float(loss), float(metrics["gradient_norm"].total))
            if "skipped" not in alarm:
                done.append((loss, metrics))
            if alarm:
                yield Record(self.first + offset + 1, "alarm", alarm, {})
            if self.skipped > self.max_skipped:
                raise NonFiniteLoss(
                    f"the loss is {alarm['loss']} and the gradient's norm {alarm['gradient_norm']} at step "
                    f"{self.first + offset}, in the window of steps {self.first} to {step - 1}, the "
                    f"{self.skipped}. in a row; a lower optimizer.learning_rate or a longer warm-up may help"
                )
        figures = {"loss": float(np.mean([loss for loss, _ in done])) if done else math.nan}
        for name in results[0][1]:
            total, weight = np.sum([np.asarray(metrics[name], np.float64) for _, metrics in done] or [(0, 0)], axis=0)
            figures[name] = float(total / weight) if weight else math.nan
        figures |= {"steps": len(results), "seconds": closed - self.opened}
        self.first, self.results = step, []
        yield Record(step, "log", figures, {})
        self.opened = closed  # the device trains on while the record is written

    def _alarm(self, loss: float, gradient_norm: float) -> dict[str, float]:
        """What is to be told of a step; empty of an ordinary one."""
        told = {"loss": loss, "gradient_norm": gradient_norm}
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.skipped += 1
            return {**told, "skipped": self.skipped}
        self.skipped = 0
        before = np.asarray(self.losses)
        self.losses.append(loss)
        if len(before) < SPIKE_STEPS // 2:
            return {}
        median = float(np.median(before))
        spread = float(np.median(np.abs(before - median)))
        return {**told, "median": median} if loss > median + SPIKE_SPREADS * spread else {}


def _apart(loss: Any, metrics: Any) -> list[tuple[Any, Any]]:
    """The results of one step each."""
    if np.ndim(loss) == 0:
        return [(loss, metrics)]
    return [(loss[place], jax.tree.map(lambda x, place=place: x[place], metrics)) for place in range(len(loss))]
