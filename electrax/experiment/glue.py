"""GLUE as a whole: its tasks one after the other, and the files that its leaderboard takes."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from electrax.config import AnyPath, UserError, find_config, load
from electrax.data.examples import BadRows, check_labels, check_numbers
from electrax.data.glue import GLUE, find_file, read_glue, write_leaderboard
from electrax.experiment import finetuned
from electrax.experiment.config import FinetuneConfig, FinetuneEvalConfig, FinetuneOptimizerConfig
from electrax.experiment.examples import read_examples
from electrax.models.heads import HeadStyle
from electrax.models.sizes import ModelConfig
from electrax.storage import path_of
from electrax.training.processes import agreed
from electrax.training.sharding import MeshConfig

AFTER_MNLI = ("rte", "mrpc", "stsb")  # small tasks that learn more from a model trained on MNLI first
UNLABELLED = ("test", "test_mismatched", "diagnostic")


@dataclasses.dataclass(frozen=True)
class GlueHeadConfig:
    style: HeadStyle = "linear"  # dense: as Transformers' classification head


@dataclasses.dataclass(frozen=True)
class GlueConfig:
    """Every task with its own shipped config; what is set here holds for all of them."""

    task: Literal["glue"] = "glue"
    path: str = ""  # the folder with the tasks' folders
    workdir: str = "runs/glue"  # a folder for each task in it
    init_from: str = ""  # work directory of a pretraining
    tasks: tuple[str, ...] = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
    seed: int = 0
    seeds: int = 5
    epochs: float = 0.0  # 0: as each task's config says
    batch_size: int = 32
    faithful: bool = False
    on_bad_row: Literal["", "error", "skip"] = ""  # as each task's config says; report all of them and end; leave out
    mnli_first: bool = False  # RTE, MRPC and STS-B once more from the best MNLI model, reported apart
    model: ModelConfig = ModelConfig()
    head: GlueHeadConfig = GlueHeadConfig()
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    eval: FinetuneEvalConfig = FinetuneEvalConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        unknown = [name for name in self.tasks if name not in GLUE]
        if unknown or not self.tasks:
            raise UserError(f"tasks: expected some of {', '.join(GLUE)}, not {', '.join(unknown) or 'none'}")
        if self.mnli_first and "mnli" not in self.tasks:
            raise UserError("mnli_first needs mnli among the tasks")
        if not self.path:
            raise UserError("path is empty; it names the folder with GLUE's own files, as in --path data/glue")


def task_configs(config: GlueConfig) -> Iterator[tuple[str, FinetuneConfig]]:
    """(row of the table, config) of every training. Raises UserError first where files are missing or have bad rows."""
    missing = [
        GLUE[name].title
        for name in config.tasks
        if not all(_has(config.path, name, split) for split in ("train", "dev"))
    ]
    if missing:
        left = ", ".join(f'"{name}"' for name in config.tasks if GLUE[name].title not in missing)
        named = ", ".join(missing)
        raise UserError(f"{config.path}: no training or dev file of {named}; for the others: --tasks '[{left}]'")
    for name in config.tasks:
        check_rows(config, name)
    after = [name for name in config.tasks if config.mnli_first and name in AFTER_MNLI]
    for name in config.tasks:
        yield name, _config(config, name, name, config.init_from)
    for name in after:
        start = str(path_of(config.workdir) / "mnli")
        yield f"{name} after mnli", _config(config, name, f"{name}-after-mnli", start)


def check_rows(config: GlueConfig, name: str) -> None:
    """Raises UserError for the bad rows of a task's training, dev and test files."""
    data = _config(config, name, name, config.init_from).data
    train, dev, bad = read_examples(data, "classes")
    if GLUE[name].classes:
        check_labels([*train, *dev], GLUE[name].classes, bad)
    else:
        check_numbers([*train, *dev], bad)
    bad.close(config.path)
    for split in UNLABELLED:
        if _has(config.path, name, split):
            bad = BadRows("error")
            read_glue(config.path, GLUE[name], split, bad)
            bad.close(config.path)


def _config(config: GlueConfig, name: str, folder: str, init_from: str) -> FinetuneConfig:
    task = load(FinetuneConfig, find_config(name, "finetune"))
    return dataclasses.replace(
        task,
        workdir=str(path_of(config.workdir) / folder),
        init_from=init_from,
        seed=config.seed,
        seeds=config.seeds,
        epochs=config.epochs or task.epochs,
        batch_size=config.batch_size,
        faithful=config.faithful,
        model=config.model,
        head=dataclasses.replace(task.head, style=config.head.style),
        optimizer=config.optimizer,
        eval=config.eval,
        mesh=config.mesh,
        data=dataclasses.replace(task.data, path=config.path, on_bad_row=config.on_bad_row or task.data.on_bad_row),
    )


def predict_tests(config: GlueConfig, name: str, workdir: str) -> list[AnyPath]:
    """Writes the leaderboard's file of every unlabelled split that is there, with the best model's predictions."""
    task, written = GLUE[name], []
    splits = [split for split in UNLABELLED if _has(config.path, name, split)]
    model = finetuned.load(workdir) if splits else None
    for split in splits:
        bad = BadRows("error")
        examples = read_glue(config.path, task, split, bad)
        bad.close(config.path)
        rows = model.predict([example.texts for example in examples])
        path = path_of(config.workdir) / "leaderboard" / task.leaderboard_file(split)
        predictions = [row["label"] if task.classes else min(max(row["value"], 0.0), 5.0) for row in rows]
        ids = [example.id for example in examples]
        agreed(write_leaderboard, task, ids, predictions, path)
        written.append(path)
    return written


def _has(path: str, name: str, split: str) -> bool:
    try:
        return find_file(path, GLUE[name], split).is_file()
    except UserError:
        return False
