"""What the readers of fine-tuning data share: kinds of example, lines of a file, and rows that cannot be used."""

import contextlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from electrax.config import UserError
from electrax.data.compressed import BrokenData, open_decompressed
from electrax.data.outside import MAX_DOCUMENT_BYTES, parse_json

MAX_LINE_BYTES = 16 << 20  # of a line, and of a cell that runs over several
SHOWN = 5  # bad rows in an error message

OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True)
class TextExample:
    """One text, a pair, or for multiple choice a context and then each choice."""

    where: str  # "reviews.csv, line 7"
    texts: tuple[str, ...]
    label: str | tuple[str, ...] | None  # as written; a tuple for multi-label; None where the file has none
    id: str = ""  # the benchmark's own index, where it has one


@dataclass(frozen=True)
class TaggedExample:
    """A sentence as words, with one tag a word; `tags` is None where the file has none."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    id: str = ""


@dataclass(frozen=True)
class Answer:
    """`text` stands in the context from character `start` on."""

    text: str
    start: int


@dataclass(frozen=True)
class QuestionExample:
    """A question on a context. Possible and without an answer: the file has no answers (a test set).

    `golds` are the texts that count as right in an evaluation, where the file has such beside the places of answers.
    """

    where: str
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    impossible: bool = False
    golds: tuple[str, ...] = ()


Example = TypeVar("Example", TextExample, TaggedExample, QuestionExample)


class Fault(NamedTuple):
    """What is wrong with a row: a kind to count by, and one line that says what was expected."""

    kind: str
    message: str


@dataclass(frozen=True)
class BadRow:
    """Stands in a stream of examples for a row that cannot be used."""

    where: str
    kind: str
    message: str


class BadRows:
    """Collects bad rows, so that all of them are reported at once."""

    def __init__(self, on_bad_row: OnBadRow = "error"):
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter()
        self._shown: list[str] = []

    def add(self, where: str, kind: str, message: str) -> None:
        self.counts[kind] += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"{where}: {message}")

    def close(self, source: str | os.PathLike) -> None:
        """After the whole input: one UserError for all bad rows, unless they are to be skipped."""
        count = self.counts.total()
        if self.on_bad_row == "skip" or not count:
            return
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.counts.most_common())
        more = f"; and {count - len(self._shown)} more" if count > len(self._shown) else ""
        raise UserError(
            f"{os.fspath(source)}: {count} bad row{'s' * (count > 1)} ({kinds}): {'; '.join(self._shown)}{more}; "
            'data.on_bad_row = "skip" leaves them out'
        )


def collect(
    items: Iterable[Example | BadRow], bad: BadRows, source: str | os.PathLike, limit: int | None = None
) -> list[Example]:
    """The first `limit` examples of a stream, with its bad rows added to `bad`. None that can be used is a UserError,
    which with on_bad_row="error" is left to `bad.close` where that can say more."""
    examples: list[Example] = []
    for item in items:
        if isinstance(item, BadRow):
            bad.add(item.where, item.kind, item.message)
        else:
            examples.append(item)
        if len(examples) == limit:
            break
    if not examples and (bad.on_bad_row == "skip" or not bad.counts):
        raise UserError(f"{os.fspath(source)}: expected rows, found none that can be used")
    return examples


# -- files -------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    number: int  # from 1
    text: str  # with its end; not to be used where there is a fault
    fault: Fault | None


def read_lines(path: str | os.PathLike) -> Iterator[Line]:
    """The lines of a UTF-8 file, perhaps compressed, in bounded memory; only a newline ends one.

    A missing, unreadable or truncated file is a UserError; a NUL byte, broken UTF-8 and an over-long line are faults.
    """
    with open_binary(path) as file:
        yield from decode_lines(file)


def decode_lines(file: io.IOBase) -> Iterator[Line]:
    """The lines of an open file, as `read_lines` gives them."""
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            fault = Fault("long line", f"expected a line of at most {MAX_LINE_BYTES >> 20} MiB")
            yield Line(number, "\n", fault)
            continue
        yield Line(number, *_decoded(data, "utf-8-sig" if number == 1 else "utf-8"))


def _decoded(data: bytes, codec: str) -> tuple[str, Fault | None]:
    fault = None
    if b"\0" in data:
        fault = Fault("NUL byte", "expected UTF-8 text, found a NUL byte (a binary or UTF-16 file?)")
    try:
        return data.decode(codec), fault
    except UnicodeDecodeError as error:
        found = f"found 0x{error.object[error.start]:02x} ({error.reason})"
        fault = fault or Fault("encoding", f"byte {error.start + 1}: expected UTF-8, {found}")
        return data.decode(codec, "replace"), fault


def read_json(path: str | os.PathLike) -> Any:
    """A whole file, perhaps compressed, as one JSON value; anything else, or too much of it, is a UserError."""
    with open_binary(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(f"{os.fspath(path)}: expected at most {MAX_DOCUMENT_BYTES:,} bytes of JSON")
    try:
        return parse_json(data)
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}, byte {error.start + 1}: expected UTF-8 ({error.reason})") from None
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: expected JSON ({error})") from None


@contextlib.contextmanager
def open_binary(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """A file's decompressed bytes; what goes wrong in reading them is a UserError."""
    name = os.fspath(path)
    try:
        with open_decompressed(name) as (_, file):
            yield file
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except BrokenData as error:
        raise UserError(f"{name}: truncated or broken compressed data ({error})") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None


# -- values ------------------------------------------------------------------------------------------------------------


def short(value: Any, width: int = 60) -> str:
    """A value for a message: quoted, on one line, cut to about `width` characters."""
    text = repr(value[: width + 1] if isinstance(value, str) else value)
    return text if len(text) <= width + 2 else text[:width] + "…"


def text_fault(value: Any, name: str) -> Fault | None:
    """What keeps a value from being used as a text; `name` says in the message whose it is."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return Fault("empty text", f"expected text in {name}, found none")
    if isinstance(value, str) and "\0" in value:
        return Fault("NUL byte", f"expected text in {name}, found a NUL character")
    return string_fault(value, name)


def string_fault(value: Any, name: str) -> Fault | None:
    """What keeps a value from being tokenized, as an empty text can be; otherwise as `text_fault`."""
    if not isinstance(value, str):
        return Fault("not text", f"expected text in {name}, found {short(value)}")
    try:
        value.encode()  # JSON can spell what no UTF-8 can
    except UnicodeEncodeError:
        return Fault("encoding", f"expected text in {name}, found half a surrogate pair")
    return None


def check_texts(what: str, row: str, rows: Iterable[Sequence[Any]]) -> None:
    """Raises UserError for the first text that cannot be tokenized. `what` names what was called, `row` a row."""
    for number, texts in enumerate(rows):
        for place, text in enumerate(texts):
            if fault := string_fault(text, f"{row} {number}" + (f", place {place}" if len(texts) > 1 else "")):
                raise UserError(f"{what}: {fault.message}")


# -- labels ------------------------------------------------------------------------------------------------------------


def find_classes(examples: Sequence[TextExample]) -> tuple[str, ...]:
    """The labels that occur, in order of value where all are numbers, else in alphabetical order. Raises UserError for
    one number written in two ways, as 1 and 1.0 in a table, which would be two classes."""
    first: dict[str, str] = {}  # label -> where
    for example in examples:
        for label in _labels(example):
            first.setdefault(label, example.where)
    numbers = {label: _number(label) for label in first}
    _check_written_once(numbers, first)
    if any(number is None for number in numbers.values()):
        return tuple(sorted(first))
    return tuple(sorted(first, key=lambda label: (numbers[label], label)))


def _check_written_once(numbers: dict[str, float | None], where: dict[str, str]) -> None:
    written: dict[float, str] = {}
    for label, number in numbers.items():
        known = label if number is None else written.setdefault(number, label)
        if known != label:
            raise UserError(
                f"{where[label]}: expected the label {known!r} as in {where[known]}, found {label!r} (one number)"
            )


def check_labels(
    examples: Sequence[TextExample], classes: Sequence[str], bad: BadRows, meaning: str = ""
) -> list[TextExample]:
    """The examples whose labels are all among `classes`; the others go to `bad`, with what a label means."""
    meaning = f" ({meaning})" if meaning else ""
    known, good = set(classes), []
    names = ", ".join(map(short, classes[:10])) + (f", … ({len(classes)} in all)" if len(classes) > 10 else "")
    for example in examples:
        unknown = [label for label in _labels(example) if label not in known]
        if example.label is None or unknown:
            found = f"{short(unknown[0])}" if unknown else "none"
            bad.add(example.where, "label", f"expected one of the labels {names}{meaning}, found {found}")
        else:
            good.append(example)
    return good


def check_numbers(examples: Sequence[TextExample], bad: BadRows) -> list[TextExample]:
    """The examples whose label `float` reads as a finite number; the others go to `bad`."""
    good = []
    for example in examples:
        if isinstance(example.label, str) and _number(example.label) is not None:
            good.append(example)
        else:
            bad.add(example.where, "label", f"expected a number as label, found {short(example.label)}")
    return good


def _labels(example: TextExample) -> tuple[str, ...]:
    match example.label:
        case None:
            return ()
        case str(label):
            return (label,)
        case labels:
            return labels


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None
