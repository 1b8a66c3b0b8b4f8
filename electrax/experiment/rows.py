"""Labelled examples as the rows of a task."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from electrax.config import UserError
from electrax.data.encoded import RowBatches, TokenRows, encode_pairs, kept
from electrax.data.examples import (
    BadRows,
    QuestionExample,
    TaggedExample,
    TextExample,
    check_labels,
    check_numbers,
    find_classes,
    short,
)
from electrax.data.glue import GLUE
from electrax.data.parallel import PairBatches
from electrax.data.templates import fill_templates
from electrax.data.tokenizer import Tokenizer
from electrax.data.windows import Windows, make_windows
from electrax.data.words import encode_words, with_labels, word_padding
from electrax.experiment.config import HeadConfig
from electrax.experiment.examples import ExamplesConfig
from electrax.inference.classifier import Classifier
from electrax.tasks.tag import label_words, tag_set
from electrax.tasks.tags import most_fitting


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """The rows of a task, what its head's outputs mean (kept as head.json), and what there is to say about them."""

    train: RowBatches | PairBatches | None  # none of a model that is only evaluated
    dev: RowBatches | PairBatches | None
    head: dict[str, Any]
    notes: tuple[str, ...]
    windows: Windows | None = None  # those of dev
    references: Sequence[tuple[str, ...]] = ()  # what the texts of dev may become
    target: Tokenizer | None = None  # of what they become
    dev_sha256: str = ""  # of the dev examples


CHOICE = "the number of the right choice, counted from 0"

# -- classification ----------------------------------------------------------------------------------------------------


def classify_rows(
    config: ExamplesConfig,
    outputs: HeadConfig,
    tokenizer: Tokenizer,
    train: list[TextExample],
    dev: list[TextExample],
    bad: BadRows,
    batch_size: int,
    known: dict[str, Any] | None,
    teacher: Classifier | None,
) -> TaskRows:
    """Rows of ids with the field `label`, as ClassifyTask wants them, or with a template TemplateTask. `known` is the
    head of a model that is only evaluated. Raises UserError for all bad rows at once."""
    kind = outputs.kind
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
        if kind == "choice":
            _check_first_choice(config, classes, train, dev)
        meaning = CHOICE if kind == "choice" else ""
        train, dev = check_labels(train, classes, bad, meaning), check_labels(dev, classes, bad, meaning)
    bad.close(config.path)
    if kind in ("classes", "labels") and len(classes) < 2 and train:
        _check_differ(config, kind, train)
    if config.both_orders:
        train = train + [dataclasses.replace(e, texts=e.texts[::-1]) for e in train if len(e.texts) == 2]
    head = {"classes": list(classes), "scale": scale, "metric": _metric(glue, kind)}
    cut, batches = {}, {}
    for name, examples in {"train": train, "dev": dev}.items():
        if not examples:
            batches[name] = None
            continue
        rows = _encode(tokenizer, examples, outputs, classes, config.max_length)
        cut[name] = int(rows.fields["cut"].sum())
        fields = {"label": _labels(kind, examples, classes, scale)}
        if teacher and name == "train":
            fields["teacher"] = _taught(teacher, examples, classes, scale)
        rows = dataclasses.replace(rows, fields=fields)
        fill = {"ids": tokenizer.pad_id, "spans": 0}
        batches[name] = _batches(config, rows, batch_size, fill, name)
    return TaskRows(**batches, head=head, notes=notes_of(bad, cut, config.max_length))


def _batches(config: ExamplesConfig, rows: TokenRows, batch_size: int, fill: dict[str, int], name: str) -> RowBatches:
    """Those of a small dev set may be cut down to a row a device; several processes divide batches of one size."""
    least = jax.device_count() if name == "dev" and jax.process_count() == 1 else None
    return RowBatches.of(rows, batch_size, fill, config.shapes, least, config.length_multiple or 1)


def template_words(outputs: HeadConfig, classes: Sequence[str]) -> tuple[str, ...]:
    """The word of each class. Raises UserError where there are more or fewer of them than classes."""
    if outputs.words and len(outputs.words) != len(classes):
        names = ", ".join(classes)
        raise UserError(f"head.words has {len(outputs.words)} words for the {len(classes)} classes {names}")
    return outputs.words or tuple(classes)


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


def _check_differ(config: ExamplesConfig, kind: str, train: list[TextExample]) -> None:
    """Raises UserError where the rows leave nothing to tell apart."""
    labels = {example.label for example in train}
    if not any(labels):
        raise UserError(f"{config.path}: no row has a label in {config.label!r}; expected some that have one")
    if len(labels) < 2:
        expected = "some rows without it, or other labels" if kind == "labels" else "two labels or more"
        raise UserError(f"{config.path}: all rows have the label {find_classes(train)[0]!r}; expected {expected}")


def _classes(kind: str, train: list[TextExample]) -> tuple[str, ...]:
    if kind == "choice":  # the label is the number of the choice, from 0
        return tuple(str(i) for i in range(max((len(e.texts) - 1 for e in train), default=2)))
    return find_classes(train)


def _check_first_choice(
    config: ExamplesConfig, classes: Sequence[str], train: list[TextExample], dev: list[TextExample]
) -> None:
    """Raises UserError for training rows that count their choices from 1."""
    labels = {example.label for example in [*train, *dev]}
    if train and labels and labels <= {str(i) for i in range(1, len(classes) + 1)}:
        raise UserError(
            f"{config.path}: expected as label {CHOICE}, found {', '.join(sorted(labels))} alone (counted from 1?)"
        )


def _metric(glue, kind: str) -> str:
    if glue:
        return glue.metrics[0]
    return {"number": "spearman", "labels": "micro_f1"}.get(kind, "accuracy")


def _encode(
    tokenizer: Tokenizer, examples: list[TextExample], outputs: HeadConfig, classes: Sequence[str], max_length: int
) -> TokenRows:
    """With the field `cut`, which says whether a row lost tokens. Tokenised once for the same texts."""
    texts = _texts(outputs.kind, examples)
    if outputs.template:
        words = template_words(outputs, classes)

        def build_filled() -> TokenRows:
            ids, spans, cut = fill_templates(tokenizer, texts, words, outputs.template, max_length)
            return TokenRows.of(ids, {"spans": spans}).with_fields(cut=cut)

        rows = kept(build_filled, tokenizer.sha256, max_length, texts, outputs.template, words)
        return dataclasses.replace(rows, group=len(words))

    def build() -> TokenRows:
        ids, cut = encode_pairs(tokenizer, texts, max_length)
        return TokenRows.of(ids).with_fields(cut=cut)

    rows = kept(build, tokenizer.sha256, max_length, texts)
    return dataclasses.replace(rows, group=len(examples[0].texts) - 1) if outputs.kind == "choice" else rows


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


def notes_of(bad: BadRows, cut: dict[str, int], *lengths: int) -> tuple[str, ...]:
    """How many rows of each kind were cut to the one of `lengths` that is its (the last for targets), and left out."""
    notes = [
        f"{count:,} {name} rows longer than {lengths[-1 if 'target' in name else 0]} tokens were cut"
        for name, count in cut.items()
        if count
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
        batches[name] = _tag_batches(config, tokenizer, good, tags, scheme, batch_size, name) if good else None
    bad.close(config.path)
    head = {"classes": list(tags), "scheme": scheme, "metric": "f1" if scheme else "accuracy"}
    notes = notes_of(bad, {}, config.max_length)
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
    name: str,
) -> RowBatches:
    words = [e.words for e in examples]
    rows = kept(
        lambda: encode_words(tokenizer, words, config.max_length), "words", tokenizer.sha256, config.max_length, words
    )
    rows = with_labels(rows, label_words(examples, tags, scheme))
    return _batches(config, rows, batch_size, word_padding(tokenizer.pad_id), name)


# -- question answering ------------------------------------------------------------------------------------------------


def answer_rows(
    config: ExamplesConfig,
    no_answer: bool,
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
            if example.impossible and not no_answer:
                bad.add(example.where, "answer", "expected an answer, or head.no_answer true, found none")
            elif not (example.impossible or example.answers):
                bad.add(example.where, "answer", "expected an answer to learn from or to compare with, found none")
        examples = [example for example in examples if example.answers or (example.impossible and no_answer)]
        made = make_windows(tokenizer, examples, config.max_length, config.doc_stride, config.max_query, keep=True)
        for row in made.bad:
            bad.add(row.where, row.kind, row.message)
        fill = {"ids": tokenizer.pad_id}
        batches[name] = _batches(config, made.rows, batch_size, fill, name) if len(made.rows) else None
        windows[name] = made
    bad.close(config.path)
    head = {"classes": [], "null_threshold": null_threshold, "metric": "f1"}
    return TaskRows(**batches, head=head, notes=notes_of(bad, {}, config.max_length), windows=windows["dev"])
