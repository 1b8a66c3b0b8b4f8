"""What a run leaves and shows: metrics.jsonl, TensorBoard files, a progress bar or plain lines."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from electrax.config import AnyPath
from electrax.storage import Mirror, is_remote, write_atomically

METRICS_FILE = "metrics.jsonl"
SHOWN = {
    "loss": "loss",
    "mlm_loss": "mlm",
    "rtd_loss": "rtd",
    "masked_accuracy": "mlm acc",
    "rtd_accuracy": "rtd acc",
    "accuracy": "accuracy",
}
SHOWN_HELD_OUT = {**SHOWN, "rtd_auc": "rtd auc"} | {
    name: name
    for name in (
        "f1",
        "matthews",
        "pearson",
        "spearman",
        "exact",
        "micro_f1",
        "bleu",
        "chrf",
        "rouge1",
        "rouge2",
        "rougeL",
    )
}


class Record(NamedTuple):
    """What happened after `step` steps: means over those since the last "log", an "eval", a "save"; or in the last one
    an "alarm": its update was skipped, or its loss lies far above those before."""

    step: int
    kind: Literal["log", "eval", "save", "alarm"]
    figures: dict[str, float]
    arrays: dict[str, np.ndarray]  # by held-out row, of an "eval"


class Tracker:
    """Writes records to the work directory and shows them on a console.

    `rates` gives the figures that follow from a window's steps and seconds. What an earlier process logged beyond
    `start`, the step this one resumes from, is dropped: it will come again.
    """

    def __init__(self, workdir: AnyPath, start: int, steps: int, rates: Callable[[int, float, int], dict], console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from tensorboardX import SummaryWriter

        self._rates, self._steps, self._console = rates, steps, console
        self._mirror = Mirror(workdir, [METRICS_FILE]) if is_remote(workdir) else None
        workdir = self._mirror.folder if self._mirror else workdir
        path = workdir / METRICS_FILE
        self._seconds = _keep_until(path, start, finished=start == steps) if path.is_file() else 0.0
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir), purge_step=start + 1, write_to_disk=True)
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar_task = self._bar.add_task("", total=steps, completed=start, figures="")
        self._bar.start()

    def write(self, record: Record) -> None:
        """One line in metrics.jsonl a "log" or "eval" record; evaluations carry the prefix `eval_`."""
        if record.kind == "save":
            if self._mirror:
                self._mirror.copy(now=True)  # a run that goes on from this step has all lines before it
            if not self._console.is_terminal:
                self._console.print(f"step {record.step}: saving in the background")
            return
        figures = dict(record.figures)
        if record.kind == "alarm":
            figures = {f"alarm_{name}": value for name, value in figures.items()}
        elif record.kind == "log":
            taken, seconds = figures.pop("steps"), figures.pop("seconds")
            self._seconds += seconds
            figures = {"seconds": self._seconds, **figures, **self._rates(record.step, seconds, taken)}
        else:
            figures = {f"eval_{name}": value for name, value in figures.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"step": record.step, **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name.replace("eval_", "eval/", 1), value, record.step)
        if self._mirror:
            self._mirror.copy()
        line = describe(record, figures)
        if record.kind == "log" and self._console.is_terminal:
            self._bar.update(self._bar_task, completed=record.step, figures=line)
        else:
            self._console.print(f"step {record.step}/{self._steps}  {line}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
        self._file.close()
        self._board.close()
        if self._mirror:
            self._mirror.close()


class NoTracker:
    """In the place of a tracker where another process keeps track."""

    def write(self, record: Record) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def describe(record: Record, figures: dict[str, float]) -> str:
    """A record on one line."""
    if record.kind == "alarm":
        loss, norm = figures["alarm_loss"], figures["alarm_gradient_norm"]
        told = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
        if "alarm_skipped" in figures:
            return f"{told}: update skipped, {figures['alarm_skipped']} in a row"
        return f"{told}; the median loss of the steps before is {figures['alarm_median']:.4g}"
    if record.kind == "eval":
        parts = [
            f"{short} {figures['eval_' + name]:.3f}"
            for name, short in SHOWN_HELD_OUT.items()
            if "eval_" + name in figures
        ]
        return "held out: " + "  ".join(parts)
    parts = [f"{short} {figures[name]:.3f}" for name, short in SHOWN.items() if name in figures]
    parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"mfu {figures['mfu']:.1%}")
    return "  ".join(parts)


def _keep_until(path: pathlib.Path, start: int, finished: bool) -> float:
    """Drops the lines of later steps, damaged ones and, of a finished run, its last evaluation: all of them come again.
    Returns the seconds of the last kept log line."""
    kept, seconds = [], 0.0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step, so_far = int(row["step"]), float(row.get("seconds", seconds))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # damaged
        again = finished and step == start and "eval_loss" in row
        if step <= start and not again:
            kept.append(line)
            seconds = so_far
    write_atomically(path, "".join(line + "\n" for line in kept))
    return seconds
