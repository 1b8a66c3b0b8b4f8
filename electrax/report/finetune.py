"""What a person sees of a fine-tuning: preflight, the score and its spread over seeds, tables, what did not train."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np

from electrax.config import to_toml
from electrax.data.shards import write_atomically
from electrax.experiment.finetune import FinetuneConfig, evaluate_trained, keep_threshold, resolve, set_up
from electrax.experiment.rows import TaskRows
from electrax.experiment.run import CONFIG_FILE, RESULTS_FILE, Run
from electrax.report.common import (
    INTERRUPTED,
    console,
    show_line,
    show_machine,
    show_steps,
    show_table,
    train_and_track,
    write_results,
)
from electrax.tasks.finetune import FinetuneTask
from electrax.training.loop import Record

MOST_ROWS, MOST_COLUMNS = 25, 12  # of a table that is shown


def finetune_and_report(config: FinetuneConfig, command: str) -> int:
    """The command `finetune`: one model, or one for each seed. Returns the exit status."""
    if config.seeds == 1:
        results = train_one(config, command)
        return INTERRUPTED if results is None else 0
    config, workdir = resolve(config), pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / CONFIG_FILE, to_toml(config))
    runs: dict[str, dict[str, Any]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        name = f"seed-{seed}"
        results = read_results(workdir / name)
        if results is None:
            console.rule(f"seed {seed}")
            one = dataclasses.replace(config, seed=seed, seeds=1, workdir=str(workdir / name))
            results = train_one(one, command)
        if results is None:
            return INTERRUPTED
        runs[name] = results
    results = summarize_seeds(runs)
    write_results(workdir, results)
    for name in set(runs) - {results["best"], results["median_run"]}:
        shutil.rmtree(workdir / name / "checkpoints", ignore_errors=True)
    show_seeds(results, runs)
    return 0


def train_one(config: FinetuneConfig, command: str) -> dict[str, Any] | None:
    """Trains and reports one model; its results, or None after a stop that saved."""
    run, rows = set_up(config)
    show_preflight(run, rows)
    final = train_and_track(run, command)
    if final is None:
        return None
    if config.eval.patience:
        best = run.checkpoints.best()
        run.checkpoints.close()
        assert best is not None  # the last step is evaluated and saved
        final = evaluate_trained(run.config, step=best[0])[2]
    if "best_f1_thresh" in final.figures:  # of questions that may be without an answer
        keep_threshold(config.workdir, final.figures["best_f1_thresh"])
    results = describe(run.task, final)
    write_results(config.workdir, results)
    show_final(run.task, final)
    return results


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
        "failed": task.diagnose(final.figures, final.arrays),
        **task.tables(final.arrays),
    }


def read_results(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Of a finished run; None where it is not finished."""
    path = workdir / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def summarize_seeds(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every score, and which run is the best and which the median (the lower of two). The standard deviation is that
    of a sample."""
    names = list(runs)
    scores = np.array([np.nan if runs[name]["score"] is None else runs[name]["score"] for name in names])
    order = np.argsort(np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    return {
        "task": runs[names[0]]["task"],
        "metric": runs[names[0]]["metric"],
        "score": float(np.median(scores)),
        "scores": scores.tolist(),
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores, ddof=1)),
        "best": names[order[-1]],
        "median_run": names[order[(len(order) - 1) // 2]],
        "failed": {name: run["failed"] for name, run in runs.items() if run["failed"]},
        "metrics": runs[names[order[-1]]]["metrics"],
    }


def evaluate_and_report(config: FinetuneConfig) -> int:
    """The command `evaluate` on a fine-tuned model; nothing is written."""
    task, rows, final = evaluate_trained(config)
    show_notes(rows)
    show_final(task, final)
    return 0


# -- what is shown -----------------------------------------------------------------------------------------------------


def show_preflight(run: Run, rows: TaskRows) -> None:
    show_machine(run)
    config, train, dev = run.config, rows.train, rows.dev
    start = f"the weights of {config.init_from}" if config.init_from else "random weights"
    show_line("start", start + (f", first {config.freeze_layers} layers frozen" if config.freeze_layers else ""))
    show_line("data", f"{len(train.rows):,} training and {len(dev.rows):,} dev rows, {outputs(rows.head)}")
    lengths = ", ".join(str(length) for length in train.buckets.buckets)
    show_line("row lengths", f"{lengths} tokens; {train.buckets.padding_share():.1%} padding")
    show_notes(rows)
    show_steps(run, f"{config.batch_size} rows, {run.tokens_per_step:,.0f} tokens on average")


def show_notes(rows: TaskRows) -> None:
    for note in rows.notes:
        show_line("note", note)


def outputs(head: dict[str, Any]) -> str:
    """What a head gives, in words."""
    if head["task"] == "answer":
        return "answers as spans of the text"
    if head["task"] == "classify" and head["kind"] == "number":
        return "a number"
    names = head["classes"]
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"{len(names)} {'tags' if head['task'] == 'tag' else 'classes'}: {shown}"


def show_final(task: FinetuneTask, final: Record) -> None:
    """The figures, the tables of classes or tags, and what did not train."""
    score = f"{task.metric} {final.figures[task.metric]:.4f}"
    show_table(f"dev rows after step {final.step:,}: {score}", ("figure", "value"), final.figures.items())
    for name, rows in task.tables(final.arrays).items():
        show_rows(name.replace("_", " "), rows)
    for finding in task.diagnose(final.figures, final.arrays):
        console.print(f"[bold red]did not train:[/] {finding}", soft_wrap=True)


def show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Some rows of a table; one that is too wide is in results.json only."""
    if rows and len(rows[0]) <= MOST_COLUMNS:
        show_table(title, list(rows[0]), (row.values() for row in rows[:MOST_ROWS]))
        if len(rows) > MOST_ROWS:
            console.print(f"… and {len(rows) - MOST_ROWS} more, in {RESULTS_FILE}")


def show_seeds(results: dict[str, Any], runs: dict[str, dict[str, Any]]) -> None:
    marks = {results["median_run"]: "median, kept", results["best"]: "best, kept"}
    failed = {name: "did not train: " + "; ".join(run["failed"]) for name, run in runs.items() if run["failed"]}
    scores = dict(zip(runs, results["scores"], strict=True))
    rows = ((name, scores[name], failed.get(name) or marks.get(name, "")) for name in runs)
    show_table(f"{results['metric']} of {len(runs)} seeds", ("run", results["metric"], "note"), rows)
    console.print(f"median {results['score']:.4f}  mean {results['mean']:.4f}  standard deviation {results['std']:.4f}")
