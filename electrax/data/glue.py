"""GLUE as its own files hold it, and the files that its leaderboard takes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from electrax.config import UserError
from electrax.data.examples import BadRow, BadRows, Fault, TextExample, collect, read_lines, short, text_fault
from electrax.storage import make_folder, path_of, write_atomically

SPLITS = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
MNLI_SPLITS = {
    "train": "train.tsv",
    "dev": "dev_matched.tsv",
    "dev_mismatched": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test_mismatched": "test_mismatched.tsv",
    "diagnostic": "diagnostic.tsv",
}


@dataclass(frozen=True)
class GlueTask:
    """One of the nine tasks. Labels, in the files and on the leaderboard, are written as in `classes`."""

    title: str  # also the name of its folder
    texts: tuple[str, ...]  # columns
    label: str  # column
    classes: tuple[str, ...] = ("0", "1")  # in the reference's order; none: a number from 0 to 5
    metrics: tuple[str, ...] = ("accuracy",)  # the headline first
    both_orders: bool = False  # the reference trains on the second text before the first too
    header: tuple[str, ...] = ()  # the columns where the files with labels name none
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)  # -> file
    leaderboard: Mapping[str, str] = field(default_factory=dict)  # unlabelled split -> file, where not TITLE.tsv

    def leaderboard_file(self, split: str) -> str:
        """The name that the leaderboard wants for the predictions of an unlabelled split."""
        return self.leaderboard.get(split, f"{self.title}.tsv")


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    "cola": GlueTask(
        "CoLA", ("sentence",), "label", metrics=("matthews",), header=("source", "label", "star", "sentence")
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label"),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", metrics=("accuracy", "f1"), both_orders=True),
    "stsb": GlueTask("STS-B", PAIR, "score", classes=(), metrics=("spearman", "pearson"), both_orders=True),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", metrics=("accuracy", "f1")),
    "mnli": GlueTask(
        "MNLI",
        PAIR,
        "gold_label",
        classes=("contradiction", "entailment", "neutral"),
        splits=MNLI_SPLITS,
        leaderboard={"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "diagnostic": "AX.tsv"},
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", classes=ENTAILMENT),
    "rte": GlueTask("RTE", PAIR, "label", classes=ENTAILMENT),
    "wnli": GlueTask("WNLI", PAIR, "label"),
}


def read_glue(folder: str | os.PathLike, task: GlueTask, split: str, bad: BadRows) -> list[TextExample]:
    """A split from `folder`, the task's own or the one that holds it. Test and diagnostic splits have no labels.

    Cells are separated by tabs and never quoted; blank lines are left out. Labels are not checked here.
    """
    path = find_file(folder, task, split)
    return collect(_examples(path, task, labelled=split == "train" or split.startswith("dev")), bad, path)


def write_leaderboard(
    task: GlueTask, ids: Sequence[str], predictions: Sequence[str] | Sequence[float], path: str | os.PathLike
) -> None:
    """The file that the leaderboard takes: index and prediction, a class or for STS-B a number. All or nothing."""
    lines = ["index\tprediction"]
    for index, prediction in zip(ids, predictions, strict=True):
        if task.classes and prediction not in task.classes:
            raise ValueError(f"{task.title}: expected one of {', '.join(task.classes)}, found {prediction!r}")
        lines.append(f"{index}\t{prediction if task.classes else format(prediction, '.3f')}")
    file = path_of(path)
    make_folder(file.parent)
    write_atomically(file, "\n".join(lines) + "\n")


def find_file(folder: str | os.PathLike, task: GlueTask, split: str) -> Path:
    """The file of a split in the task's own folder or the one that holds it."""
    folder = Path(folder)
    if split not in task.splits:
        raise UserError(f"{task.title}: expected one of the splits {', '.join(task.splits)}, found {short(split)}")
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with GLUE's files")
    homes = [path for path in (folder, *sorted(folder.iterdir())) if _same(path.name, task.title) and path.is_dir()]
    if split == "diagnostic":  # the download has a folder of its own for it
        homes += [path for home in (folder, folder.parent) for path in sorted(home.glob("diagnostic"))]
    for home in homes:
        if (home / task.splits[split]).is_file():
            return home / task.splits[split]
    raise UserError(f"{folder}: expected the file {task.title}/{task.splits[split]} in it")


def _same(name: str, title: str) -> bool:
    """SST-2, sst2 and SST_2 are one task."""
    return [c for c in name.lower() if c.isalnum()] == [c for c in title.lower() if c.isalnum()]


def _examples(path: Path, task: GlueTask, labelled: bool) -> Iterator[TextExample | BadRow]:
    columns = task.header if labelled else ()
    for line in read_lines(path):
        text, where = line.text.rstrip("\r\n"), f"{path}, line {line.number}"
        cells = text.split("\t")
        if not columns:
            columns = tuple(cells)
            missing = [name for name in (*task.texts, *[task.label] * labelled) if name not in columns]
            if line.fault:
                raise UserError(f"{where}: {line.fault.message}")
            if missing:
                found = short(", ".join(columns), 200)
                raise UserError(f"{where}: expected a header with {', '.join(missing)}; found {found}")
        elif text or line.fault:
            made = line.fault or _example(where, cells, columns, task)
            yield BadRow(where, *made) if isinstance(made, Fault) else made


def _example(where: str, cells: list[str], columns: tuple[str, ...], task: GlueTask) -> TextExample | Fault:
    if len(cells) != len(columns):
        return Fault("ragged row", f"expected {len(columns)} cells, found {len(cells)}")
    row = dict(zip(columns, cells, strict=True))
    for name in task.texts:
        if fault := text_fault(row[name], f"column {name!r}"):
            return fault
    label = row[task.label].strip() if task.label in row else None
    if label == "":
        return Fault("label", f"expected a label in column {task.label!r}, found none")
    return TextExample(where, tuple(row[name] for name in task.texts), label, row.get("index", row.get("id", "")))
