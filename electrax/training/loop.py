"""THE loop: pretraining and fine-tuning are the same call with another task."""

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from electrax.config import UserError
from electrax.tasks.base import Batch, Params, Task
from electrax.training.checkpoint import Checkpoints
from electrax.training.sharding import local_rows, put_batch
from electrax.training.state import Request, StepResult, TrainState
from electrax.training.tracking import Record


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 1000  # steps; the last step is always evaluated
    rows: int = 0  # held-out rows to use; 0: all


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 100  # steps


class NonFiniteLoss(UserError):
    """The loss or its gradient became NaN or infinite; nothing after that was saved."""


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
    mesh: Mesh,
    *,
    steps: int,
    eval_every: int,
    save_every: int,
    log_every: int,
    patience: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Record | Request, StepResult | None, None]:
    """Trains from `state` (whose buffers it takes over) to `steps` updates.

    The order of the body is law: evaluate the old state, save it, take the next batch, step, log the steps before. So
    data advances only after saving, the position in the data is the step, and the host never waits for the step it has
    just started. After `patience` evaluations without a better score (0: never) training ends. Raises NonFiniteLoss,
    or Interrupted once `stop()` is true.

    Without `step_function` every step is yielded as a Request, and what it gives must be sent, as `lockstep` does.
    """
    start = int(state.step)
    saved = start if start in checkpoints.steps() else -1
    best = checkpoints.best() if patience else None
    window = _Window(start)
    for step in range(start, steps + 1):
        exhausted = best is not None and step - best[0] >= patience * eval_every
        last, stopping, score = step == steps or exhausted, stop(), None
        if (step > start or last) and (last or step % eval_every == 0) and not stopping:
            yield from window.close(step)
            figures, arrays = evaluate(state.params)
            score = task.score(figures)
            if patience and (best is None or score > best[1]):
                best, last = (step, score), step == steps
            yield Record(step, "eval", figures, arrays)
            window.reopen()
        if step > saved and (last or stopping or (step > start and step % save_every == 0)):
            yield from window.close(step)  # a state that is not finite is never saved
            checkpoints.save(step, state, score)
            yield Record(step, "save", {}, {})
            window.reopen()
        if stopping:
            raise Interrupted(step)
        if last:
            return
        batch = put_batch(task.train_batch(step, local_rows(task.batch_size)), mesh)
        if step_function is None:
            state, loss, metrics = yield Request(step, state, batch)
            window.start()
        else:
            state, loss, metrics = step_function(state, batch)
        if step % log_every == 0:
            yield from window.close(step)
            window.reopen()
        window.add(loss, metrics)


class _Window:
    """Results of the steps since the last log line, left on the device until the line is due."""

    def __init__(self, step: int):
        self.first, self.results, self.seconds, self.opened = step, [], 0.0, time.perf_counter()

    def add(self, loss: jax.Array, metrics: Any) -> None:
        self.results.append((loss, metrics))

    def start(self) -> None:
        """Before its first step nothing counts: what other runs did since is not this one's training time."""
        if not self.results:
            self.reopen()

    def reopen(self) -> None:
        """Time goes on counting: evaluation and saving are not training time."""
        self.opened = time.perf_counter()

    def close(self, step: int) -> Iterator[Record]:
        """The means over the window as a log record after `step` updates; nothing if no step is in it."""
        if not self.results:
            return
        results = jax.device_get(self.results)
        seconds = time.perf_counter() - self.opened
        for offset, (loss, metrics) in enumerate(results):
            if not (math.isfinite(loss) and math.isfinite(metrics["gradient_norm"].total)):
                raise NonFiniteLoss(
                    f"the loss is {float(loss)} and the gradient's norm {float(metrics['gradient_norm'].total)} "
                    f"at step {self.first + offset}, in the window of steps {self.first} to {step - 1}; "
                    "the last checkpoint is from before. A lower optimizer.learning_rate or a longer warm-up may help"
                )
        figures = {"loss": float(np.mean([loss for loss, _ in results]))}
        for name in results[0][1]:
            total, weight = np.sum([np.asarray(metrics[name], np.float64) for _, metrics in results], axis=0)
            figures[name] = float(total / weight) if weight else math.nan
        figures |= {"steps": len(results), "seconds": seconds}
        self.first, self.results = step, []
        yield Record(step, "log", figures, {})
