"""What a person sees of GLUE as a whole: every task's training, then one table."""

import math

import numpy as np
from rich.markup import escape

from electrax.data.glue import GLUE
from electrax.experiment.glue import GlueConfig, predict_tests, task_configs
from electrax.experiment.results import check_kept, read_results
from electrax.report.common import console, show_table, write_results
from electrax.report.finetune import finetune_and_report
from electrax.storage import path_of

LEFT_OUT = "wnli"  # of the average, as in the literature


def glue_and_report(config: GlueConfig, command: str) -> int:
    """Trains every task (those that are finished already are only measured again), writes the leaderboard's files and
    the table. Returns the exit status. Raises UserError before the first training where the work directory holds a task
    with other settings or on other rows."""
    results, files = {}, []
    configs = dict(task_configs(config))
    for row, task in configs.items():
        if row in GLUE:  # what a task after MNLI starts from may not be there yet
            check_kept(task)
    for row, task in configs.items():
        console.rule(row)
        status = finetune_and_report(task, command)
        if status:
            return status
        results[row] = read_results(path_of(task.workdir))
        if row in GLUE:
            files += predict_tests(config, row, task.workdir)
    averaged = [row for row in results if row in GLUE and row != LEFT_OUT]
    average = float(np.mean([_percent(results[row]["score"]) for row in averaged])) if averaged else math.nan
    rows = [(_title(row), found["metric"], _percent(found["score"]), _spread(found)) for row, found in results.items()]
    show_table("GLUE dev, median over seeds x 100", ("task", "metric", "score", "std"), rows)
    if averaged:
        console.print(f"average of {', '.join(map(_title, averaged))}: {average:.2f}", soft_wrap=True)
    for row, found in results.items():
        for finding in _failed(found):
            console.print(f"{_title(row)} [bold red]did not train:[/] {escape(finding)}", soft_wrap=True)
    for path in files:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    keys = ("metric", "score", "scores", "std", "failed")
    kept = {row: {key: found.get(key) for key in keys} for row, found in results.items()}
    write_results(config.workdir, {"task": "glue", "average": average / 100, "averaged": averaged, "tasks": kept})
    return 0


def _title(row: str) -> str:
    name, _, rest = row.partition(" ")
    return f"{GLUE[name].title} {rest}".strip()


def _failed(found: dict) -> list[str]:
    """What did not train, of several seeds with their names."""
    failed = found["failed"]
    if isinstance(failed, list):
        return failed
    return [f"{name}: {finding}" for name, findings in failed.items() for finding in findings]


def _percent(share: float | None) -> float:
    """NaN for what was not a number, as the correlation with a constant."""
    return math.nan if share is None else 100 * share


def _spread(found: dict) -> float | str:
    return _percent(found["std"]) if "std" in found else ""
