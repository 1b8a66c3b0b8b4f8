"""What a fine-tuned head's outputs mean: head.json of the work directory."""

import json
import os
from typing import Any

from electrax.config import AnyPath, UserError
from electrax.data.outside import read_object
from electrax.experiment.config import FinetuneConfig, read_config
from electrax.experiment.run import HEAD_FILE, holds_run
from electrax.storage import path_of, write_atomically
from electrax.training.processes import agreed


def read_head(workdir: str | os.PathLike) -> dict[str, Any]:
    """What `head.json` says of a fine-tuned model's outputs."""
    path = path_of(workdir) / HEAD_FILE
    try:
        head = read_object(path, task=str, kind=str, style=str, metric=str, classes=list, rows=str)
        own = {
            "classify": {"scale": (int, float)},
            "answer": {"null_threshold": (int, float)},
            "rewrite": {"target": dict},
        }
        read_object(path, **own.get(head["task"], {}))
    except UserError as error:
        raise UserError(f"{path}: missing or damaged; expected the work directory of a fine-tuning ({error})") from None
    task = read_config(workdir).task
    names = [*head["classes"], *([head["scheme"]] if head.get("scheme") else [])]
    if head["task"] != task or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: damaged; expected what the outputs of the task {task} mean")
    return head


def keep_head(config: FinetuneConfig, head: dict[str, Any]) -> None:
    """Writes head.json. Raises UserError where checkpoints are kept of a run on other rows."""
    workdir = path_of(config.workdir)
    if holds_run(workdir):
        check_rows(config, head)
    write_atomically(workdir / HEAD_FILE, json.dumps(head, indent=1) + "\n")


def check_rows(config: FinetuneConfig, head: dict[str, Any]) -> None:
    """Raises UserError where the run that is kept was trained on other rows than those that `head` was made of."""
    workdir = path_of(config.workdir)
    if read_head(workdir)["rows"] != head["rows"]:
        raise UserError(
            f"{workdir / HEAD_FILE} holds a run on other rows than those of {config.data.path}; take another workdir"
        )


def keep_threshold(workdir: str | os.PathLike, threshold: float) -> None:
    """Stores the null threshold that was best on the dev questions with the model."""
    head = read_head(workdir) | {"null_threshold": threshold}
    agreed(write_atomically, path_of(workdir) / HEAD_FILE, json.dumps(head, indent=1) + "\n")


def same_outputs(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a.get(key) == b.get(key) for key in ("task", "kind", "style", "classes", "target"))


def takes_head(start: AnyPath, head: dict[str, Any]) -> bool:
    """Whether a run starts with the head of the fine-tuning it takes its weights from."""
    return (start / HEAD_FILE).is_file() and same_outputs(read_head(start), head)
