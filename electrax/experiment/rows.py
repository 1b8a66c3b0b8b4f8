"""Labelled examples of a benchmark or of a person's own files, as the rows of a task."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from electrax.config import UserError
from electrax.data.conll import read_conll, read_conllu
from electrax.data.encoded import RowBatches, TokenRows, encode_pairs, kept
from electrax.data.examples import (
    BadRows,
    Example,
    QuestionExample,
    TaggedExample,
    TextExample,
    check_labels,
    check_numbers,
    find_classes,
    short,
)
from electrax.data.glue import GLUE, read_glue
from electrax.data.squad import read_mrqa, read_squad
from electrax.data.tables import TFDS_PREFIX, read_table
from electrax.data.tokenizer import Tokenizer
from electrax.data.windows import Windows, make_windows
from electrax.data.words import encode_words, with_labels, word_padding
from electrax.inference.classifier import Classifier
from electrax.tasks.tag import label_words, tag_set
from electrax.tasks.tags import most_fitting

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
COMPRESSED = ("", ".gz", ".xz", ".zst")
NAMES = {"train": ("train",), "dev": ("dev", "valid", "validation")}  # of tables in a folder
TFDS_SPLITS = {"train": "train", "dev": "validation"}


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """Where the labelled rows come from, and how they become tokens."""

    path: str = ""  # a folder with a benchmark's own files, a file of one's own, or tfds:NAME
    tfds_dir: str = ""  # where prepared datasets lie; default: ~/tensorflow_datasets
    format: Literal["table", "glue", "squad", "mrqa", "conll", "conllu"] = "table"
    glue: str = ""  # which task of GLUE
    train: str = ""  # file within path (a split of tfds); default: the file that path names, or train.csv and the like
    dev: str = ""  # the same of the rows to evaluate on; none: a share of train's
    holdout: float = 0.1  # that share
    limit: int = 0  # training rows to use, drawn evenly; 0: all
    on_bad_row: Literal["error", "skip"] = "error"  # report all of them and end, or leave them out and count
    text: tuple[str, ...] = ("text",)  # columns: one, two for a pair, or the context and each choice
    label: str = "label"  # column
    label_separator: str = ""  # between the labels of a row, for several labels
    word_column: int = 0  # of CoNLL files; -1 is the last
    tag_column: int = -1
    tag: str = "upos"  # which annotation of Universal Dependencies
    both_orders: bool = False  # train on the second text before the first too
    max_length: int = 128  # tokens in a row
    doc_stride: int = 128  # tokens between the windows of a long context
    max_query: int = 64  # tokens of a question
    shapes: int = 12  # row lengths that are compiled
    tokenizer: str = "wordpiece"  # without init_from: one to train on the rows, or the path of one
    vocab_size: int = 8000
    lowercase: bool = True

    def __post_init__(self):
        if self.format == "glue" and self.glue not in GLUE:
            raise UserError(f"data.glue must be one of {', '.join(GLUE)}, not {self.glue!r}")
        if self.max_length < 8 or self.shapes < 1:
            found = f"{self.max_length} and {self.shapes}"
            raise UserError(f"data.max_length must be at least 8 and data.shapes at least 1, not {found}")
        if not 0 < self.holdout < 1:
            raise UserError(f"data.holdout must lie between 0 and 1, not {self.holdout}")


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """The rows of a task, what its head's outputs mean (kept as head.json), and what there is to say about them."""

    train: RowBatches | None  # none of a model that is only evaluated
    dev: RowBatches | None
    head: dict[str, Any]
    notes: tuple[str, ...]
    windows: Windows | None = None  # those of dev


# -- reading -----------------------------------------------------------------------------------------------------------


def read_examples(
    config: ExamplesConfig, kind: str = "classes", train: bool = True, whole: bool = False
) -> tuple[list[Example], list[Example], BadRows]:
    """(training examples, dev examples, bad rows), all of them read; without `train` only the dev examples.

    Where no dev file is named or found, the same `holdout` of the training rows is kept apart in every run, or with
    `whole` all rows of the file are dev examples. `kind` is that of the head.
    """
    if not config.path:
        raise UserError("data.path is empty; it names a folder with the benchmark's files, a file, or tfds:NAME")
    bad = BadRows(config.on_bad_row)
    dev_source = _source(config, "dev")
    dev = _read(config, "dev", dev_source, bad) if dev_source else []
    rows = _read(config, "train", _source(config, "train"), bad) if train or not dev_source else []
    if not dev_source:
        if len(rows) < 2:
            bad.close(config.path)
            raise UserError(f"{config.path}: one row cannot be divided into rows to train and to evaluate on")
        rows, dev = ([], rows) if whole else hold_out(rows, config.holdout, kind)
    if not train:
        return [], dev, bad
    chosen = np.random.default_rng(0).permutation(len(rows))[: config.limit or None]
    return [rows[i] for i in sorted(chosen)], dev, bad


def hold_out(rows: list[Example], share: float, kind: str) -> tuple[list[Example], list[Example]]:
    """(training rows, dev rows), at random but the same ones every time. Questions on one context stay together, and a
    row whose label no training row has is trained on, unless the labels are numbers."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.context if isinstance(row, QuestionExample) else place, []).append(place)
    dev: set[int] = set()
    shuffled = list(groups.values())
    for number in np.random.default_rng(0).permutation(len(shuffled)):
        if len(dev) >= max(1, round(share * len(rows))):
            break
        dev.update(shuffled[number])
    known = {label for place, row in enumerate(rows) if place not in dev for label in _labels_of(row)}
    if kind != "number":
        dev = {place for place in dev if known.issuperset(_labels_of(rows[place]))} or dev
    places = range(len(rows))
    return [rows[i] for i in places if i not in dev], [rows[i] for i in places if i in dev]


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
    named, path = getattr(config, split), pathlib.Path(config.path)
    if config.format == "glue":
        return named or split
    if config.path.startswith(TFDS_PREFIX):
        return f"{config.path}/{named or TFDS_SPLITS[split]}"
    if path.is_file():
        if split == "train":
            return config.path
        return _find(path.parent, named) if named else None
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder (data.path)")
    if named:
        return _find(path, named)
    suffixes = TABLES if config.format == "table" else (".json", ".jsonl", ".txt", ".conll", ".conllu")
    found = [path / f"{name}{kind}{c}" for name in NAMES[split] for kind in suffixes for c in COMPRESSED]
    existing = next((str(p) for p in found if p.is_file()), None)
    if existing is None and split == "train":
        raise UserError(f"{path}: expected train{suffixes[0]} or the like in it, or its name as data.train")
    return existing


def _find(folder: pathlib.Path, name: str) -> str:
    """A file of the folder, or a path of its own; compressed or not."""
    for base in (folder / name, pathlib.Path(name)):
        for suffix in COMPRESSED:
            path = base.with_name(base.name + suffix)
            if path.is_file():
                return str(path)
    raise UserError(f"{folder / name}: no such file")


def _read(config: ExamplesConfig, split: str, source: str, bad: BadRows) -> list[Example]:
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
    return read_table(source, config.text, config.label, bad, config.label_separator, tfds_dir=config.tfds_dir or None)


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


# -- classification ----------------------------------------------------------------------------------------------------


def classify_rows(
    config: ExamplesConfig,
    kind: str,
    tokenizer: Tokenizer,
    train: list[TextExample],
    dev: list[TextExample],
    bad: BadRows,
    batch_size: int,
    known: dict[str, Any] | None,
    teacher: Classifier | None,
) -> TaskRows:
    """Rows of ids with the field `label`, as ClassifyTask wants them. `known` is the head of a model that is only
    evaluated. Raises UserError for all bad rows at once."""
    glue = GLUE.get(config.glue) if config.format == "glue" else None
    classes, scale = (), 1.0
    if kind == "number":
        train, dev = check_numbers(train, bad), check_numbers(dev, bad)
        most = 5.0 if glue else max((abs(float(e.label)) for e in train), default=1.0)  # STS-B's grades end at 5
        scale = known["scale"] if known else most or 1.0
    else:
        classes = tuple(known["classes"]) if known else glue.classes if glue else _classes(kind, train)
        if kind != "labels":
            train, dev = _single(train, bad), _single(dev, bad)
        train, dev = check_labels(train, classes, bad), check_labels(dev, classes, bad)
    bad.close(config.path)
    if kind in ("classes", "labels") and len(classes) < 2 and train:
        raise UserError(f"{config.path}: all rows have the label {classes[0]!r}; expected two labels or more")
    if config.both_orders:
        train = train + [dataclasses.replace(e, texts=e.texts[::-1]) for e in train if len(e.texts) == 2]
    head = {"classes": list(classes), "scale": scale, "metric": _metric(glue, kind)}
    cut, batches = {}, {}
    for name, examples in {"train": train, "dev": dev}.items():
        if not examples:
            batches[name] = None
            continue
        rows = _encode(tokenizer, examples, kind, config.max_length)
        cut[name] = int(rows.fields["cut"].sum())
        fields = {"label": _labels(kind, examples, classes, scale)}
        if teacher and name == "train":
            fields["teacher"] = _taught(teacher, examples, classes, scale)
        rows = dataclasses.replace(rows, fields=fields)
        batches[name] = RowBatches.of(rows, batch_size, {"ids": tokenizer.pad_id}, config.shapes)
    return TaskRows(**batches, head=head, notes=_notes(bad, cut, config))


def _taught(
    teacher: Classifier, examples: list[TextExample], classes: Sequence[str], scale: float
) -> Float[np.ndarray, "N C"]:
    """The teacher's logits, or its numbers divided by `scale`."""
    if teacher.task.classes != tuple(classes):
        raise UserError("teacher.path: its classes are not those of the rows")
    logits = teacher.logits(_texts(teacher.task.kind, examples)).reshape(len(examples), -1)
    return logits * (teacher.task.scale / scale)


def _single(examples: list[TextExample], bad: BadRows) -> list[TextExample]:
    """The examples with one label; the others go to `bad`."""
    for example in examples:
        if not isinstance(example.label, str):
            bad.add(example.where, "label", f'expected one label, found {short(example.label)} (head.kind "labels"?)')
    return [example for example in examples if isinstance(example.label, str)]


def _classes(kind: str, train: list[TextExample]) -> tuple[str, ...]:
    if kind == "choice":  # the label is the number of the choice, from 0
        return tuple(str(i) for i in range(max((len(e.texts) - 1 for e in train), default=2)))
    return find_classes(train)


def _metric(glue, kind: str) -> str:
    if glue:
        return glue.metrics[0]
    return {"number": "spearman", "labels": "micro_f1"}.get(kind, "accuracy")


def _encode(tokenizer: Tokenizer, examples: list[TextExample], kind: str, max_length: int) -> TokenRows:
    """With the field `cut`, which says whether a row lost tokens. Tokenised once for the same texts."""
    texts = _texts(kind, examples)

    def build() -> TokenRows:
        ids, cut = encode_pairs(tokenizer, texts, max_length)
        return TokenRows.of(ids).with_fields(cut=cut)

    rows = kept(build, tokenizer.sha256, max_length, texts)
    return dataclasses.replace(rows, group=len(examples[0].texts) - 1) if kind == "choice" else rows


def _texts(kind: str, examples: list[TextExample]) -> list[tuple[str, ...]]:
    """What the encoder reads of the rows: of a choice the context with each of the choices."""
    if kind == "choice":
        return [(e.texts[0], choice) for e in examples for choice in e.texts[1:]]
    return [e.texts for e in examples]


def _labels(kind: str, examples: list[TextExample], classes: Sequence[str], scale: float) -> np.ndarray:
    if kind == "number":
        return np.array([float(e.label) / scale for e in examples], np.float32)
    number = {name: i for i, name in enumerate(classes)}
    if kind != "labels":
        return np.array([number[e.label] for e in examples], np.int32)
    out = np.zeros((len(examples), len(classes)), np.float32)
    for row, example in enumerate(examples):
        labels = (example.label,) if isinstance(example.label, str) else example.label
        out[row, [number[name] for name in labels]] = 1.0
    return out


def _notes(bad: BadRows, cut: dict[str, int], config: ExamplesConfig) -> tuple[str, ...]:
    notes = [
        f"{count:,} {name} rows longer than {config.max_length} tokens were cut" for name, count in cut.items() if count
    ]
    skipped = ", ".join(f"{count} {kind}" for kind, count in bad.counts.most_common())
    return (*notes, *([f"bad rows left out: {skipped}"] if skipped else []))


# -- tagging -----------------------------------------------------------------------------------------------------------


def tag_rows(
    config: ExamplesConfig,
    tokenizer: Tokenizer,
    train: list[TaggedExample],
    dev: list[TaggedExample],
    bad: BadRows,
    batch_size: int,
    known: dict[str, Any] | None,
) -> TaskRows:
    """Rows of words with their labels, as TagTask wants them; otherwise as `classify_rows`."""
    scheme, unfit = (known["scheme"], 0) if known else most_fitting([e.tags for e in train if e.tags])
    tags = tuple(known["classes"]) if known else tag_set([e.tags for e in train], scheme)
    batches = {}
    for name, examples in {"train": train, "dev": dev}.items():
        good = [e for e in examples if _has_tags(e, tags, scheme, bad)]
        batches[name] = _tag_batches(config, tokenizer, good, tags, scheme, batch_size) if good else None
    bad.close(config.path)
    head = {"classes": list(tags), "scheme": scheme, "metric": "f1" if scheme else "accuracy"}
    notes = _notes(bad, {}, config)
    if unfit:
        notes += (f"{unfit:,} training sentences are not valid {scheme}; their spans are read by conlleval's rule",)
    return TaskRows(**batches, head=head, notes=notes)


def _has_tags(example: TaggedExample, tags: Sequence[str], scheme: str | None, bad: BadRows) -> bool:
    try:
        label_words([example], tags, scheme)
    except UserError as error:
        bad.add(example.where, "tag", str(error).removeprefix(f"{example.where}: "))
        return False
    return True


def _tag_batches(
    config: ExamplesConfig,
    tokenizer: Tokenizer,
    examples: list[TaggedExample],
    tags: Sequence[str],
    scheme: str | None,
    batch_size: int,
) -> RowBatches:
    words = [e.words for e in examples]
    rows = kept(
        lambda: encode_words(tokenizer, words, config.max_length), "words", tokenizer.sha256, config.max_length, words
    )
    rows = with_labels(rows, label_words(examples, tags, scheme))
    return RowBatches.of(rows, batch_size, word_padding(tokenizer.pad_id), config.shapes)


# -- question answering ------------------------------------------------------------------------------------------------


def answer_rows(
    config: ExamplesConfig,
    null_threshold: float,
    tokenizer: Tokenizer,
    train: list[QuestionExample],
    dev: list[QuestionExample],
    bad: BadRows,
    batch_size: int,
) -> TaskRows:
    """Windows with the tokens of their answers, as AnswerTask wants them; otherwise as `classify_rows`."""
    batches, windows = {}, {}
    for name, examples in {"train": train, "dev": dev}.items():
        for example in examples:
            if not (example.impossible or example.answers):
                bad.add(example.where, "answer", "expected an answer to learn from or to compare with, found none")
        examples = [example for example in examples if example.impossible or example.answers]
        made = make_windows(tokenizer, examples, config.max_length, config.doc_stride, config.max_query)
        for row in made.bad:
            bad.add(row.where, row.kind, row.message)
        fill = {"ids": tokenizer.pad_id}
        batches[name] = RowBatches.of(made.rows, batch_size, fill, config.shapes) if len(made.rows) else None
        windows[name] = made
    bad.close(config.path)
    head = {"classes": [], "null_threshold": null_threshold, "metric": "f1"}
    return TaskRows(**batches, head=head, notes=_notes(bad, {}, config), windows=windows["dev"])
