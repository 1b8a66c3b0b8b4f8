"""What a work directory holds of finished fine-tunings, and what their results.json says: of one model, or of seeds."""

import dataclasses
import math
from typing import Any

import numpy as np

from electrax.config import AnyPath, UserError
from electrax.data.outside import read_object
from electrax.experiment.config import FinetuneConfig, TeacherConfig, read_config
from electrax.experiment.finetune import check, resolve, steps_of
from electrax.experiment.head import check_rows, keep_threshold
from electrax.experiment.run import (
    MAY_CHANGE,
    RESULTS_FILE,
    Run,
    check_continued,
    check_steps,
    differences,
    holds_run,
    is_among,
)
from electrax.storage import path_of
from electrax.tasks.finetune import LESS_IS_BETTER, FinetuneTask
from electrax.training.processes import agreed, together
from electrax.training.tracking import Record


def kept_folders(config: FinetuneConfig) -> list[AnyPath]:
    """Where the work directory holds what this config may continue: itself, or the folders of its seeds. Raises
    UserError where it holds one seed and the config wants several, or the other way round."""
    workdir = path_of(config.workdir)
    seeds = agreed(lambda: sorted(path.name for path in workdir.glob("seed-*")))
    if config.seeds > 1 and holds_run(workdir):
        raise UserError(f"{workdir} holds a run of one seed; take another workdir for several")
    if config.seeds == 1 and seeds:
        raise UserError(f"{workdir} holds runs of several seeds; take another workdir for one")
    folders = [workdir] if config.seeds == 1 else [workdir / name for name in seeds]
    return [folder for folder in folders if holds_run(folder)]


def check_kept(config: FinetuneConfig) -> str:
    """The hash of the dev rows, where the work directory holds checkpoints; else nothing. Raises UserError where they
    are of a run with other settings or on other training rows, which this one does not continue."""
    config, dev_rows = resolve(config), ""
    folders = kept_folders(config)
    if folders:
        agreed(check_continued, config)
    for folder in folders:
        one = dataclasses.replace(config, workdir=str(folder), teacher=TeacherConfig())  # it changes no row
        with together():
            rows = check(one)[2]
            check_rows(one, rows.head)
            check_steps(folder, steps_of(config, rows))
        dev_rows = rows.dev_sha256
    return dev_rows


def is_of(config: FinetuneConfig, failed: bool) -> bool:
    """Whether the finished run of a work directory has this config, its length too, and where it did not train as much
    patience with steps that are not finite."""
    kept, wanted = dataclasses.asdict(read_config(config.workdir)), dataclasses.asdict(config)
    without_effect = MAY_CHANGE - {"steps", "epochs", "eval"} - ({"optimizer.max_skipped"} if failed else set())
    return all(is_among(key, without_effect) for key, _, _ in differences(kept, wanted))


def at_best_threshold(run: Run, final: Record) -> tuple[FinetuneTask, Record]:
    """Stores the null threshold that is best on the dev questions with the model; the task with it, and its figures.

    The best one is the score of a question, which rounding may move: half-way to the next score decides the same. The
    official sweep names no threshold where no answer at all is best: that is one below all scores.
    """
    figure = "exact" if run.task.metric in ("exact", "best_exact") else "f1"
    threshold = final.figures[f"best_{figure}_thresh"]
    scores = [found["null_score"] for found in run.task.predictions(final.arrays)]
    threshold += min((score - threshold for score in scores if score > threshold), default=0.0) / 2

    def under(threshold: float) -> tuple[FinetuneTask, Record]:
        task = dataclasses.replace(run.task, null_threshold=threshold)
        return task, final._replace(figures=task.summarize({"loss": final.figures["loss"]}, final.arrays))

    tried = [under(threshold), under(min(scores) - 1.0)]
    task, final = max(tried, key=lambda found: found[1].figures[figure])
    keep_threshold(run.config.workdir, task.null_threshold)
    return task, final


def describe(task: FinetuneTask, final: Record) -> dict[str, Any]:
    """What results.json says of one model."""
    score = final.figures[task.metric]
    return {
        "task": type(task).__name__.removesuffix("Task").lower(),
        "metric": task.metric,
        "score": score,
        "scores": [score],
        "step": final.step,
        "metrics": final.figures,
        "failed": findings(task, final),
        **task.tables(final.arrays),
    }


def findings(task: FinetuneTask, final: Record) -> list[str]:
    """What did not train, in words; empty where it did."""
    found = task.diagnose(final.figures, final.arrays)
    if not found and math.isnan(final.figures[task.metric]):
        return [f"its {task.metric} is not a number"]
    return found


def read_results(workdir: AnyPath) -> dict[str, Any] | None:
    """Of a finished run; None where it is not finished."""
    path = workdir / RESULTS_FILE
    return agreed(lambda: read_object(path) if path.is_file() else None)


def summarize_seeds(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What results.json says of several seeds: every score, median, mean and standard deviation (of a sample) of those
    that are numbers, which run is the best and which the median (the lower of two), and of the best one its tables."""
    names = list(runs)
    scores = np.array([np.nan if run["score"] is None else run["score"] for run in runs.values()])
    metric = next((run["metric"] for run in runs.values() if run["metric"]), None)
    goodness = -scores if metric in LESS_IS_BETTER else scores
    order = np.argsort(np.where(np.isnan(scores), -np.inf, goodness), kind="stable")
    numbers = scores[~np.isnan(scores)]
    best = names[order[-1]]
    return runs[best] | {
        "metric": metric,
        "score": float(np.median(numbers)) if len(numbers) else float("nan"),
        "scores": scores.tolist(),
        "mean": float(np.mean(numbers)) if len(numbers) else float("nan"),
        "std": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else float("nan"),
        "best": best,
        "median_run": names[order[(len(order) - 1) // 2]],
        "failed": {name: run["failed"] for name, run in runs.items() if run["failed"]},
    }
