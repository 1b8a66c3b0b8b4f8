"""What a person sees of a fine-tuning: preflight, the score and its spread over seeds, tables, what did not train."""

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.markup import escape

from electrax.config import to_toml
from electrax.experiment.config import FinetuneConfig
from electrax.experiment.finetune import evaluate_trained, plan, resolve, set_up
from electrax.experiment.results import (
    at_best_threshold,
    check_kept,
    describe,
    findings,
    is_of,
    kept_folders,
    read_results,
    summarize_seeds,
)
from electrax.experiment.rows import TaskRows
from electrax.experiment.run import CONFIG_FILE, RESULTS_FILE, Run, holds_run
from electrax.report.common import (
    INTERRUPTED,
    alone,
    console,
    show_line,
    show_machine,
    show_plan,
    show_steps,
    show_table,
    train_and_track,
    train_and_track_side_by_side,
    write_results,
)
from electrax.storage import make_folder, path_of, remove_folder, write_atomically
from electrax.tasks.finetune import FinetuneTask
from electrax.training.loop import Record
from electrax.training.processes import agreed
from electrax.training.window import NonFiniteLoss

MOST_ROWS, MOST_COLUMNS = 25, 12  # of a table that is shown


def finetune_and_report(config: FinetuneConfig, command: str) -> int:
    """The command `finetune`: one model, or one for each seed. Returns the exit status."""
    if config.dry_run:
        show_plan(plan(config))
        return 0
    if config.seeds == 1:
        kept_folders(config)
        results = train_one(config, command)
        return INTERRUPTED if results is None else 0
    config, workdir = resolve(config), path_of(config.workdir)
    dev_rows = check_kept(config)

    def keep_config() -> None:
        make_folder(workdir)
        write_atomically(workdir / CONFIG_FILE, to_toml(config))

    agreed(keep_config)
    runs = train_seeds(config, range(config.seed, config.seed + config.seeds), command, dev_rows)
    if runs is None:
        return INTERRUPTED
    results = summarize_seeds(runs)
    keep = {results["best"], results["median_run"]}
    lost = []  # what an earlier choice among fewer seeds did not keep
    for name in keep:
        if runs[name]["score"] is not None and not holds_run(workdir / name):
            agreed((workdir / name / RESULTS_FILE).unlink, True)
            lost.append(int(name.removeprefix("seed-")))
    if train_seeds(config, lost, command, dev_rows) is None:
        return INTERRUPTED
    write_results(workdir, results)
    for name in set(runs) - keep:
        agreed(remove_folder, workdir / name / "checkpoints")
    show_seeds(results, runs)
    return 0


def train_seeds(
    config: FinetuneConfig, seeds: Iterable[int], command: str, dev_rows: str
) -> dict[str, dict[str, Any]] | None:
    """The results of these seeds by the names of their runs, of which those are trained that are not there yet; None
    after a stop that saved. `dev_rows` is what `check_kept` gives."""
    runs, left = {}, {}
    for seed in sorted(seeds):
        name = f"seed-{seed}"
        workdir = path_of(config.workdir) / name
        one = dataclasses.replace(config, seed=seed, seeds=1, workdir=str(workdir))
        runs[name] = found = read_results(workdir)
        if found is None or found.get("dev_rows") != dev_rows or not is_of(one, failed=found["score"] is None):
            left[name] = one
    while left:
        results = train_some(left, command)
        if results is None:
            return None
        runs |= results
        left = {name: one for name, one in left.items() if name not in results}
    return runs


def train_some(configs: dict[str, FinetuneConfig], command: str) -> dict[str, dict[str, Any]] | None:
    """The results of the first of these runs, and of as many more as are trained side by side with it."""
    made: dict[str, tuple[Run, TaskRows]] = {}
    with contextlib.ExitStack() as stack:
        at_once = len(configs)
        for name, config in configs.items():
            if len(made) == at_once:
                break
            stack.enter_context(alone(config.workdir))
            made[name] = set_up(config, early=not made and config.seeds_at_once < 2)
            if len(made) == 1:
                console.rule(name.replace("-", " "))
                show_preflight(*made[name])
                at_once = min(at_once, config.seeds_at_once or made[name][0].models_at_once())
        if at_once > 1:
            show_line("side by side", ", ".join(made))
        finals = train_and_track_all({name: run for name, (run, _) in made.items()}, command)
        if finals is None:
            return None
        results = {}
        for name, (run, rows) in made.items():
            if at_once > 1:
                console.rule(name.replace("-", " "))
            results[name] = finish(run, rows, finals[name])
        return results


def train_and_track_all(runs: dict[str, Run], command: str) -> dict[str, Record | NonFiniteLoss] | None:
    """The last evaluation of each run, or why it did not train; None after a stop that saved."""
    if len(runs) > 1:
        return train_and_track_side_by_side(runs, command)
    [(name, run)] = runs.items()
    try:
        final = train_and_track(run, command)
    except NonFiniteLoss as error:  # other seeds are worth having
        return {name: error}
    return final and {name: final}


def train_one(config: FinetuneConfig, command: str) -> dict[str, Any] | None:
    """Trains and reports one model; its results, or None after a stop that saved."""
    with alone(config.workdir):
        run, rows = set_up(config, early=True)
        show_preflight(run, rows)
        final = train_and_track(run, command)
        return final and finish(run, rows, final)


def finish(run: Run, rows: TaskRows, final: Record | NonFiniteLoss) -> dict[str, Any]:
    """Reports a trained model, or why it did not train, and writes its results."""
    config = run.config
    if isinstance(final, NonFiniteLoss):
        console.print(f"[bold red]did not train:[/] {escape(str(final))}", soft_wrap=True)
        results = {"task": config.task, "metric": None, "score": None, "scores": [None], "failed": [str(final)]}
        results["dev_rows"] = rows.dev_sha256
        write_results(config.workdir, results)
        return results
    if config.eval.patience:
        best = run.checkpoints.best()
        run.checkpoints.close()
        assert best is not None  # the last step is evaluated and saved
        final = evaluate_trained(config, step=best[0])[2]
    if config.task == "answer" and config.head.no_answer and config.head.null_threshold is None:
        task, final = at_best_threshold(run, final)
    else:
        task = run.task
    results = describe(task, final) | {"notes": list(rows.notes), "dev_rows": rows.dev_sha256}
    write_results(config.workdir, results)
    show_final(task, final)
    return results


def evaluate_and_report(config: FinetuneConfig) -> int:
    """The command `evaluate` on a fine-tuned model; nothing is written."""
    task, rows, final = evaluate_trained(config)
    show_line("data", f"{len(rows.dev.rows):,} rows")
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
    lengths = ", ".join("→".join(map(str, np.atleast_1d(length))) for length in train.buckets.buckets)
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
    if head["task"] == "rewrite":
        return f"texts of {head['target']['vocab_size']:,} tokens"
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
    for finding in findings(task, final):
        console.print(f"[bold red]did not train:[/] {escape(finding)}", soft_wrap=True)


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
