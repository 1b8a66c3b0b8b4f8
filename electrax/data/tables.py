"""Texts with labels, words with tags, and questions with answers, from the columns of a table (data/records.py)."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from electrax.data.examples import (
    Answer,
    BadRow,
    BadRows,
    Fault,
    QuestionExample,
    TaggedExample,
    TextExample,
    collect,
    short,
    text_fault,
)
from electrax.data.records import missing_column, read_records
from electrax.data.squad import squad_answer


def read_table(
    path: str | os.PathLike,
    text: Sequence[str],
    label: str,
    bad: BadRows,
    label_separator: str = "",
    limit: int | None = None,
    tfds_dir: str | None = None,
) -> list[TextExample]:
    """The examples of a table (at most `limit`), with its bad rows added to `bad`; see `iter_table`."""
    return collect(iter_table(path, text, label, label_separator, tfds_dir), bad, path, limit)


def iter_table(
    path: str | os.PathLike,
    text: Sequence[str],
    label: str = "",
    label_separator: str = "",
    tfds_dir: str | None = None,
) -> Iterator[TextExample | BadRow]:
    """The rows in order, in bounded memory. What is wrong with the file as a whole is a UserError.

    `text` names one column, a pair, or a context and its choices; an empty `label` stands for no labels. A JSON or
    Parquet list is multi-label, and so is every label with a `label_separator`, at which it is split. Labels lose the
    white space around them. A list of sentences is one text. Of files and columns see `read_records`.
    """
    columns = [*text, label] if label else list(text)
    for where, record in read_records(os.fspath(path), columns, bool(label), tfds_dir):
        made = record if isinstance(record, Fault) else _example(where, record, text, label, label_separator)
        yield BadRow(where, *made) if isinstance(made, Fault) else made


def read_tagged(
    path: str | os.PathLike, words: str, tags: str, bad: BadRows, tfds_dir: str | None = None
) -> list[TaggedExample]:
    """The sentences of a table with their tags; see `iter_words`."""
    return collect(iter_words(path, words, tags, tfds_dir), bad, path)


def iter_words(
    path: str | os.PathLike, words: str, tags: str = "", tfds_dir: str | None = None
) -> Iterator[TaggedExample | BadRow]:
    """A sentence a row: the words of a list, or a text cut at white space, and likewise a tag for each of them."""
    columns = [words, tags] if tags else [words]
    for where, record in read_records(os.fspath(path), columns, bool(tags), tfds_dir):
        made = record if isinstance(record, Fault) else _sentence(where, record, words, tags)
        yield BadRow(where, *made) if isinstance(made, Fault) else made


def read_questions(
    path: str | os.PathLike, text: tuple[str, str], answers: str, bad: BadRows, tfds_dir: str | None = None
) -> list[QuestionExample]:
    """A question on a context a row, from the two columns `text`, with its answers.

    An answer is a text, which stands in the context (where it does so more than once, the first time is meant), or
    comes with its place as in SQuAD: {"text": …, "answer_start": …}, a list of these, or one with lists. Nothing, or an
    empty list or text, says that there is no answer. Rows are numbered from 1.
    """
    return collect(_questions(os.fspath(path), text, answers, tfds_dir), bad, path)


def _questions(
    path: str, text: tuple[str, str], answers: str, tfds_dir: str | None
) -> Iterator[QuestionExample | BadRow]:
    records = read_records(path, [*text, answers], True, tfds_dir)
    for number, (where, record) in enumerate(records, 1):
        made = record if isinstance(record, Fault) else _question(where, str(number), record, text, answers)
        yield BadRow(where, *made) if isinstance(made, Fault) else made


# -- one row -----------------------------------------------------------------------------------------------------------


def _sentence(where: str, record: dict[str, Any], column: str, tag_column: str) -> TaggedExample | Fault:
    words = _words(where, record, column)
    if isinstance(words, Fault) or not tag_column:
        return words if isinstance(words, Fault) else TaggedExample(where, words, None)
    if tag_column not in record:
        return Fault("missing column", missing_column(tag_column, list(record)))
    tags = _plain(record[tag_column])
    tags = tuple(map(_label, tags if isinstance(tags, list) else str(tags or "").split()))
    if None in tags or len(tags) != len(words):
        found = "something else" if None in tags else str(len(tags))
        return Fault("label", f"expected {len(words)} tags in column {tag_column!r}, one a word, found {found}")
    return TaggedExample(where, words, tags)


def _words(where: str, record: dict[str, Any], column: str) -> tuple[str, ...] | Fault:
    if not isinstance(record.get(column), (list, np.ndarray)):
        made = _example(where, record, (column,), "", "")
        return made if isinstance(made, Fault) else tuple(made.texts[0].split())
    words = [_example(where, {column: word}, (column,), "", "") for word in record[column]]
    fault = next((word for word in words if isinstance(word, Fault)), None)
    if not words:
        fault = Fault("empty text", f"expected words in column {column!r}, found none")
    return fault or tuple(word.texts[0] for word in words)


def _question(
    where: str, id: str, record: dict[str, Any], text: tuple[str, str], column: str
) -> QuestionExample | Fault:
    made = _example(where, record, text, "", "")
    if isinstance(made, Fault):
        return made
    if column not in record:
        return Fault("missing column", missing_column(column, list(record)))
    question, context = made.texts
    written = _plain(record[column])
    if isinstance(written, dict):
        parts = [written.get(key) for key in ("text", "answer_start")]
        parts = [part if isinstance(part, list) else [part] for part in parts]
        written = [dict(zip(("text", "answer_start"), pair, strict=False)) for pair in itertools.zip_longest(*parts)]
    elif not isinstance(written, list):
        written = [] if written is None or not str(written).strip() else [written]
    found = [_answer(answer, context) for answer in written]
    fault = next((answer for answer in found if isinstance(answer, Fault)), None)
    return fault or QuestionExample(where, id, question, context, tuple(found), impossible=not found)


def _answer(written: Any, context: str) -> Answer | Fault:
    if not isinstance(written, str):
        return squad_answer(written, context)
    text = written.strip()
    if not text or text not in context:
        return Fault("answer", f"expected an answer that stands in its context, found {short(written)}")
    return Answer(text, context.index(text))


def _example(
    where: str, record: dict[str, Any], text: Sequence[str], label: str, separator: str
) -> TextExample | Fault:
    for name in [*text, label] if label else text:
        if name not in record:
            return Fault("missing column", missing_column(name, list(record)))
    try:
        texts = [_joined(_plain(record[name])) for name in text]
        value = _label(_plain(record[label]), separator) if label else None
    except UnicodeDecodeError as error:
        return Fault("encoding", f"expected UTF-8, found 0x{error.object[error.start]:02x} ({error.reason})")
    for name, one in zip(text, texts, strict=True):
        if fault := text_fault(one, f"column {name!r}"):
            return fault
    if label and value is None:
        return Fault("label", f"expected a label in column {label!r}, found {short(_plain(record[label]))}")
    return TextExample(where, tuple(texts), value)


def _joined(value: Any) -> Any:
    """A list of sentences as one text."""
    is_sentences = isinstance(value, list) and value and all(isinstance(sentence, str) for sentence in value)
    return " ".join(value) if is_sentences else value


def _label(value: Any, separator: str = "") -> str | tuple[str, ...] | None:
    """None where there is no label, or a value that cannot be one. No label at all is a set of labels too."""
    if isinstance(value, (list, tuple)):
        labels = [_label(item, "") for item in value]
        return tuple(dict.fromkeys(labels)) if all(isinstance(label, str) for label in labels) else None
    if isinstance(value, bool):
        written = str(value).lower()
    elif isinstance(value, (int, str)) or (isinstance(value, (float, Decimal)) and math.isfinite(value)):
        written = str(value).strip()
    else:
        written = ""
    if separator and (written or value is None or value == ""):
        return tuple(dict.fromkeys(part.strip() for part in written.split(separator) if part.strip()))
    return written or None


def _plain(value: Any) -> Any:
    """Numpy's values and bytes as Python's; UnicodeDecodeError where they are no UTF-8."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.decode() if isinstance(value, bytes) else value
