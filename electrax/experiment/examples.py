"""Labelled examples of a benchmark or of a person's own files."""

import dataclasses
import hashlib
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from electrax.config import UserError
from electrax.data.conll import read_conll, read_conllu
from electrax.data.examples import BadRows, Example, QuestionExample, TaggedExample, TextExample, check_labels
from electrax.data.glue import GLUE, read_glue
from electrax.data.parallel import read_parallel
from electrax.data.readers import TFDS_PREFIX
from electrax.data.squad import read_mrqa, read_squad
from electrax.data.tables import read_questions, read_table, read_tagged
from electrax.storage import on_this_machine

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
COMPRESSED = ("", ".gz", ".xz", ".zst")
NAMES = {"train": ("train",), "dev": ("dev", "valid", "validation", "val")}  # of tables in a folder
TFDS_SPLITS = {"train": "train", "dev": "validation"}


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """Where the labelled rows come from, and how they become tokens."""

    path: str = ""  # a folder with a benchmark's own files, a file of one's own, or tfds:NAME
    tfds_dir: str = ""  # where prepared datasets lie; default: ~/tensorflow_datasets
    format: Literal["table", "glue", "squad", "mrqa", "conll", "conllu", "parallel"] = "table"
    glue: str = ""  # which task of GLUE
    train: str = ""  # file within path (a split of tfds); default: the file that path names, or train.csv and the like
    dev: str = ""  # the same of the rows to evaluate on; none: a share of train's
    holdout: float = 0.1  # that share
    limit: int = 0  # training rows to use, drawn evenly; 0: all
    augment: str = ""  # rows to train on beside them: what `electrax augment` wrote
    augment_rate: float = 1.0  # at most so many of those for each training row
    on_bad_row: Literal["error", "skip"] = "error"  # report all of them and end, or leave them out and count
    # columns: one, two for a pair or for question and context, the context and each choice, or that of words; of
    # parallel files the ending of the source's name
    text: tuple[str, ...] = ("text",)
    # column, of choices with the number of the right one, counted from 0, of words with their tags, of questions with
    # their answers; of parallel files the ending of the target's
    label: str = "label"
    label_separator: str = ""  # between the labels of a row, for several labels
    word_column: int = 0  # of CoNLL files; -1 is the last
    tag_column: int = -1
    tag: str = "upos"  # which annotation of Universal Dependencies
    both_orders: bool = False  # train on the second text before the first too
    max_length: int = 128  # tokens in a row
    doc_stride: int = 128  # tokens between the windows of a long context
    max_query: int = 64  # tokens of a question
    shapes: int = 12  # row lengths that are compiled
    length_multiple: int = 0  # that they are multiples of; 0: of 16 for attention and residuals of a GPU alone, else 1
    tokenizer: str = "wordpiece"  # without init_from: one to train on the rows, or the path of one
    vocab_size: int = 8000
    lowercase: bool = True

    def __post_init__(self):
        if self.format == "glue" and self.glue not in GLUE:
            raise UserError(f"data.glue must be one of {', '.join(GLUE)}, not {self.glue!r}")
        if self.max_length < 8 or self.shapes < 1:
            found = f"{self.max_length} and {self.shapes}"
            raise UserError(f"data.max_length must be at least 8 and data.shapes at least 1, not {found}")
        if self.length_multiple < 0:
            raise UserError(f"data.length_multiple must not be negative, but is {self.length_multiple}")
        if self.augment_rate <= 0:
            raise UserError(f"data.augment_rate must be above 0, not {self.augment_rate}")
        if not 0 < self.holdout < 1:
            raise UserError(f"data.holdout must lie between 0 and 1, not {self.holdout}")
        if self.limit < 0:
            raise UserError(f"data.limit must be at least 1, or 0 for all rows, not {self.limit}")


def read_examples(
    config: ExamplesConfig, kind: str = "classes", train: bool = True, whole: bool = False
) -> tuple[list[Example], list[Example], BadRows]:
    """(training examples, dev examples, bad rows), all of them read; without `train` only the dev examples.

    Where no dev file is named or found, the same `holdout` of the training rows is kept apart in every run, or with
    `whole` all rows of the file are dev examples. `kind` is that of the head, or "text", "tags" or "answers".
    """
    if not config.path:
        raise UserError("data.path is empty; it names a folder with the benchmark's files, a file, or tfds:NAME")
    if train and config.train and _is_one_file(config):
        raise UserError(f"data.train {config.train}: {config.path} is a file; expected a folder as data.path")
    bad = BadRows(config.on_bad_row)
    dev_source = _source(config, "dev")
    dev = _read(config, kind, "dev", dev_source, bad) if dev_source else []
    rows = _read(config, kind, "train", _source(config, "train"), bad) if train or not dev_source else []
    if not dev_source:
        if len(rows) < 2:
            bad.close(config.path)
            raise UserError(f"{config.path}: one row cannot be divided into rows to train and to evaluate on")
        rows, dev = ([], rows) if whole else hold_out(rows, config.holdout, kind)
        if not dev:
            bad.close(config.path)
            raise UserError(
                f"{config.path}: no row can be kept apart to evaluate on, as each has a label that no other row has; "
                "expected more rows, or a file of its own as data.dev"
            )
    if not train:
        return [], dev, bad
    chosen = np.random.default_rng(0).permutation(len(rows))[: config.limit or None]
    train_rows = [rows[i] for i in sorted(chosen)]
    return train_rows + _augmented(config, train_rows, kind, bad), dev, bad


def _augmented(config: ExamplesConfig, rows: list[Example], kind: str, bad: BadRows) -> list[Example]:
    """Rows that a generator made of `rows`, drawn evenly. They bring no label of their own."""
    if not config.augment:
        return []
    if config.format not in ("table", "glue") or kind in ("tags", "answers"):
        raise UserError("data.augment is for texts with labels, from a table or GLUE")
    is_glue = config.format == "glue"
    text, label = (GLUE[config.glue].texts, "label") if is_glue else (config.text, config.label)
    made = read_table(config.augment, text, label, bad, config.label_separator)
    if kind not in ("number", "text"):
        made = check_labels(made, sorted({label for row in rows for label in _labels_of(row)}), bad)
    chosen = np.random.default_rng(0).permutation(len(made))[: round(config.augment_rate * len(rows))]
    return [made[i] for i in sorted(chosen)]


def hold_out(rows: list[Example], share: float, kind: str) -> tuple[list[Example], list[Example]]:
    """(training rows, dev rows), at random but the same ones every time. Of each class its share is kept apart, and of
    one with two rows or more at least one. Questions on one context stay together. The last row of a label is trained
    on, unless the labels are numbers or texts; where all rows are such there is no dev row."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.context if isinstance(row, QuestionExample) else place, []).append(place)
    by_class = kind == "classes" and all(isinstance(row, TextExample) for row in rows)
    strata = Counter(row.label if by_class else None for row in rows)
    wanted = {stratum: max(1, round(share * size)) for stratum, size in strata.items()}
    left = Counter(label for row in rows for label in _to_be_known(row, kind))
    dev: set[int] = set()
    shuffled = list(groups.values())
    for number in np.random.default_rng(0).permutation(len(shuffled)):
        group = shuffled[number]
        stratum = rows[group[0]].label if by_class else None
        labels = Counter(label for place in group for label in _to_be_known(rows[place], kind))
        if wanted[stratum] > 0 and all(left[label] > count for label, count in labels.items()):
            dev.update(group)
            wanted[stratum] -= len(group)
            left -= labels
    places = range(len(rows))
    return [rows[i] for i in places if i not in dev], [rows[i] for i in places if i in dev]


def _to_be_known(row: Example, kind: str) -> set[str]:
    """The labels of a row that a training row must have too."""
    return set() if kind in ("number", "text") else set(_labels_of(row))


def _labels_of(row: Example) -> tuple[str, ...]:
    """What must have been seen in training to be said."""
    match row:
        case TextExample(label=str(label)):
            return (label,)
        case TextExample(label=tuple(labels)):
            return labels
        case TaggedExample(tags=tuple(tags)):
            return tags
    return ()


def _source(config: ExamplesConfig, split: str) -> str | None:
    """The file of a split, or for GLUE and TFDS its name; None for a dev split that is not there."""
    named = getattr(config, split)
    if config.path.startswith(TFDS_PREFIX):
        return f"{config.path}/{named or TFDS_SPLITS[split]}"
    path = on_this_machine(config.path, "data.path")
    if config.format == "glue":
        return named or split
    if path.is_file():
        if split == "train":
            return config.path
        return _find(path.parent, named) if named else None
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder (data.path)")
    if config.format == "parallel":
        names = (named,) if named else NAMES[split]
        found = [name for name in names if _is_there(path / f"{name}.{config.text[0]}")]
        if not found and (split == "train" or named):
            raise UserError(f"{path / names[0]}.{config.text[0]}: no such file")
        return str(path / found[0]) if found else None
    if named:
        return _find(path, named)
    suffixes = TABLES if config.format == "table" else (".json", ".jsonl", ".txt", ".conll", ".conllu")
    found = [path / f"{name}{kind}{c}" for name in NAMES[split] for kind in suffixes for c in COMPRESSED]
    existing = next((str(p) for p in found if p.is_file()), None)
    if existing is None and split == "train":
        raise UserError(f"{path}: expected train{suffixes[0]} or the like in it, or its name as data.train")
    return existing


def _is_one_file(config: ExamplesConfig) -> bool:
    is_place = config.format != "glue" and not config.path.startswith(TFDS_PREFIX)
    return is_place and on_this_machine(config.path, "data.path").is_file()


def _find(folder: pathlib.Path, name: str) -> str:
    """A file of the folder, or a path of its own; compressed or not."""
    for base in (folder / name, pathlib.Path(name)):
        for suffix in COMPRESSED:
            path = base.with_name(base.name + suffix)
            if path.is_file():
                return str(path)
    raise UserError(f"{folder / name}: no such file")


def _is_there(path: pathlib.Path) -> bool:
    """Compressed or not."""
    return any(path.with_name(path.name + suffix).is_file() for suffix in COMPRESSED)


def _read(config: ExamplesConfig, kind: str, split: str, source: str, bad: BadRows) -> list[Example]:
    match config.format:
        case "glue":
            return read_glue(config.path, GLUE[config.glue], source, bad)
        case "squad":
            return read_squad(source, bad)
        case "mrqa":
            return read_mrqa(source, bad)
        case "conll":
            return read_conll(source, bad, config.word_column, config.tag_column)
        case "conllu":
            return read_conllu(source, bad, config.tag)
        case "parallel":
            folder, name = pathlib.Path(source).parent, pathlib.Path(source).name
            return read_parallel(*(_find(folder, f"{name}.{end}") for end in (config.text[0], config.label)), bad)
    tfds_dir = config.tfds_dir or None
    match kind:
        case "tags":
            return read_tagged(source, *config.text, config.label, bad, tfds_dir)
        case "answers":
            return read_questions(source, config.text, config.label, bad, tfds_dir)
    return read_table(source, config.text, config.label, bad, config.label_separator, tfds_dir=tfds_dir)


def targets_of(examples: Sequence[TextExample]) -> list[str]:
    """What the texts shall become, to train a tokenizer on."""
    return [text for example in examples for text in references(example)]


def references(example: TextExample) -> tuple[str, ...]:
    """Each text that the example's may become."""
    label = example.label or ()
    return (label,) if isinstance(label, str) else label


def sha256_of(examples: Sequence[Example]) -> str:
    """Of everything in the examples but where they stand."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(dataclasses.replace(example, where="")).encode())
    return digest.hexdigest()


def texts_of(examples: Sequence[Example]) -> list[str]:
    """Every text, to train a tokenizer on."""
    texts: list[str] = []
    for example in examples:
        match example:
            case TextExample():
                texts += example.texts
            case TaggedExample():
                texts.append(" ".join(example.words))
            case QuestionExample():
                texts += [example.question, example.context]
    return texts
