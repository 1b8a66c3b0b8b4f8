"""THE loop: pretraining and fine-tuning are the same call with another task."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from electrax.config import UserError
from electrax.tasks.base import Batch, Params, Task
from electrax.training.checkpoint import Checkpoints
from electrax.training.feed import Feed
from electrax.training.state import Request, StepResult, TrainState
from electrax.training.tracking import Record

SPIKE_STEPS, SPIKE_SPREADS = 100, 12  # a spike: above the median of the last steps by so many median deviations


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 1000  # steps; the last step is always evaluated
    rows: int = 0  # held-out rows to use; 0: all

    def __post_init__(self):
        if self.rows < 0:
            raise UserError(f"eval.rows must be at least 1, or 0 for all rows, not {self.rows}")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 100  # steps
    stall: float = 60.0  # seconds without a step, where one is usually quicker, after which it is shown where; 0: never


class NonFiniteLoss(UserError):
    """The loss or its gradient was NaN or infinite in too many steps in a row."""


class Interrupted(Exception):
    """A stop was asked for; the state after `step` updates is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped and saved after step {step}")
        self.step = step


def train(
    task: Task,
    state: TrainState,
    step_function: Callable[[TrainState, Batch], StepResult] | None,
    evaluate: Callable[[Params], tuple[dict[str, float], dict[str, np.ndarray]]],
    checkpoints: Checkpoints,
    feed: Feed,
    *,
    steps: int,
    eval_every: int,
    save_every: int,
    log_every: int,
    patience: int = 0,
    steps_per_dispatch: int = 1,
    max_skipped: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Record | Request, StepResult | None, None]:
    """Trains from `state` (whose buffers it takes over) to `steps` updates.

    The order of the body is law: evaluate the old state, save it, take the next batch, step, log the steps before. So
    data advances only after saving, the position in the data is the step, and the host never waits for the call it has
    just made, but for the one before: a stop is never further away than two calls. After `patience` evaluations without
    a better score (0: never) training ends. Raises NonFiniteLoss after more than `max_skipped` steps in a row without
    an update, or Interrupted once `stop()` is true.

    `feed` gives the batch of a step, or of `steps_per_dispatch` steps, stacked, which `step_function.several` takes in
    one call. Without `step_function` every step is yielded as a Request and its result must be sent, as by `lockstep`.
    """
    start = step = int(state.step)
    saved = start if start in checkpoints.steps() else -1
    # a run that was stopped where an evaluation was due makes up for it
    evaluated = start if saved != start or checkpoints.score(start) is not None else -1
    best = checkpoints.best() if patience else None
    window = _Window(start, max_skipped)
    while True:
        exhausted = best is not None and step - best[0] >= patience * eval_every
        last, stopping, score = step == steps or exhausted, stop(), None
        if (step not in (0, evaluated) or last) and (last or step % eval_every == 0) and not stopping:
            yield from window.close(step)
            figures, arrays = evaluate(state.params)
            score = task.score(figures)
            if patience and (best is None or score > best[1]):
                best, last = (step, score), step == steps
            yield Record(step, "eval", figures, arrays)
            window.reopen()
        if step > saved and (last or stopping or (step > start and step % save_every == 0)):
            yield from window.close(step)
            checkpoints.save(step, state, score)
            yield Record(step, "save", {}, {})
            window.reopen()
        if stopping:
            raise Interrupted(step)
        if last:
            return
        window.wait()
        finished = window.finished()  # before the step, which a CPU may have taken when the call returns
        count = 1
        if step_function is None:
            state, loss, metrics = yield Request(step, state, feed(step, 1))
            window.start()
        else:
            count = _together(step, steps_per_dispatch, steps, (eval_every, save_every, log_every))
            take = step_function if count == 1 else step_function.several
            state, loss, metrics = take(state, feed(step, count))
        if step % log_every == 0:
            yield from window.close(step, finished)
        window.add(loss, metrics)
        step += count


def _together(step: int, wanted: int, steps: int, intervals: tuple[int, ...]) -> int:
    """How many steps to take in one call: all that are wanted if nothing is due between them, else one."""
    due = min(steps, *((step // every + 1) * every for every in intervals))
    return wanted if step + wanted <= due else 1


class _Window:
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
