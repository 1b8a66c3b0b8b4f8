"""THE loop: pretraining and fine-tuning are the same call with another task."""

import dataclasses
from collections.abc import Callable, Generator

import numpy as np

from electrax.config import UserError
from electrax.tasks.base import Batch, Params, Task
from electrax.training.checkpoint import Checkpoints
from electrax.training.feed import Feed
from electrax.training.state import Request, StepResult, TrainState
from electrax.training.tracking import Record
from electrax.training.window import Window


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
    window = Window(start, max_skipped)
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
