"""Sentences as words with one tag each: columns as CoNLL's shared tasks have them, and CoNLL-U."""

import os
from collections.abc import Callable, Iterator

from electrax.config import UserError
from electrax.data.examples import BadRow, BadRows, Fault, Line, TaggedExample, collect, read_lines, short

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
NEVER_EMPTY = ("upos", "xpos", "deprel")  # "_" says elsewhere that a word has no such thing, here that it is unknown

Word = tuple[str, str]  # with its tag, "" where none is wanted


def read_conll(
    path: str | os.PathLike, bad: BadRows, word_column: int = 0, tag_column: int | None = -1
) -> list[TaggedExample]:
    """The sentences of `iter_conll`, with its bad rows added to `bad`."""
    return collect(iter_conll(path, word_column, tag_column), bad, path)


def iter_conll(
    path: str | os.PathLike, word_column: int = 0, tag_column: int | None = -1
) -> Iterator[TaggedExample | BadRow]:
    """Words a line, with tabs or spaces between the columns; blank lines end sentences, -DOCSTART- is left out.

    Columns count from 0, or from the last with -1; without a `tag_column` the sentences have no tags. A line with
    another number of columns than the first is a bad row, and its sentence is left out.
    """
    name = os.fspath(path)
    width = 0

    def parse(line: Line) -> Word | Fault | None:
        nonlocal width
        text = line.text.rstrip("\r\n")
        cells = [cell for cell in text.split(" ") if cell] if "\t" not in text else text.split("\t")
        if cells[0] == "-DOCSTART-":
            return None
        if not width:
            width = len(cells)
            _check_columns(f"{name}, line {line.number}", width, word_column, tag_column)
        if len(cells) != width:
            return Fault("ragged row", f"expected {width} columns, found {len(cells)}")
        return cells[word_column].strip(), cells[tag_column].strip() if tag_column is not None else ""

    return _sentences(name, parse, tag_column is not None, id_comment="")


def read_conllu(path: str | os.PathLike, bad: BadRows, column: str | None = "upos") -> list[TaggedExample]:
    """The sentences of `iter_conllu`, with its bad rows added to `bad`."""
    return collect(iter_conllu(path, column), bad, path)


def iter_conllu(path: str | os.PathLike, column: str | None = "upos") -> Iterator[TaggedExample | BadRow]:
    """CoNLL-U: the syntactic words, tagged with a column of CONLLU (none: no tags); `sent_id` is the id.

    Multiword tokens (1-2) and empty nodes (8.1) are left out.
    """
    if column is not None and column not in CONLLU[2:]:
        raise UserError(f"{os.fspath(path)}: expected one of the columns {', '.join(CONLLU[2:])}, found {column!r}")

    def parse(line: Line) -> Word | Fault | None:
        cells = line.text.rstrip("\r\n").split("\t")
        if line.text.startswith("#"):
            return None
        if len(cells) != len(CONLLU):
            return Fault("ragged row", f"expected {len(CONLLU)} columns with tabs between them, found {len(cells)}")
        if not cells[0].isdecimal():
            nodes = cells[0].replace(".", "-").split("-")
            if len(nodes) == 2 and all(node.isdecimal() for node in nodes):
                return None
            return Fault("word number", f"expected a number like 1, 1-2 or 1.1, found {short(cells[0])}")
        tag = cells[CONLLU.index(column)].strip() if column else ""
        return cells[1].strip(), "" if tag == "_" and column in NEVER_EMPTY else tag

    return _sentences(os.fspath(path), parse, column is not None, id_comment="# sent_id = ")


def _sentences(
    path: str, parse: Callable[[Line], Word | Fault | None], tagged: bool, id_comment: str
) -> Iterator[TaggedExample | BadRow]:
    """`parse` turns a line that is not blank into a word, a fault, or None where it is to be left out.

    A sentence with bad lines comes out as these.
    """
    words: list[Word] = []
    faults: list[BadRow] = []
    first, id = 0, ""

    def finish() -> Iterator[TaggedExample | BadRow]:
        if faults:
            yield from faults
        elif words:
            forms, tags = zip(*words, strict=True)
            yield TaggedExample(f"{path}, line {first}", forms, tags if tagged else None, id)

    for line in read_lines(path):
        if not line.fault and not line.text.strip(" \t\r\n"):
            yield from finish()
            words, faults, first, id = [], [], 0, ""
            continue
        if id_comment and line.text.startswith(id_comment):
            id = line.text.removeprefix(id_comment).strip()
        parsed = line.fault or parse(line)
        if parsed is not None and not isinstance(parsed, Fault):
            parsed = _word_fault(parsed, tagged) or parsed
        if isinstance(parsed, Fault):
            faults.append(BadRow(f"{path}, line {line.number}", *parsed))
        elif parsed is not None:
            words.append(parsed)
            first = first or line.number
    yield from finish()


def _word_fault(word: Word, tagged: bool) -> Fault | None:
    if not word[0]:
        return Fault("empty text", "expected a word, found none")
    if tagged and not word[1]:
        return Fault("label", f"expected a tag for the word {short(word[0])}, found none")
    return None


def _check_columns(where: str, width: int, word_column: int, tag_column: int | None) -> None:
    wanted = [word_column] if tag_column is None else [word_column, tag_column]
    places = {column % width for column in wanted if -width <= column < width}
    if len(places) < len(wanted):
        columns = f"words in column {word_column}" + (
            f" and tags in column {tag_column}" if tag_column is not None else ""
        )
        raise UserError(f"{where}: expected {columns}, found {width} column{'s' * (width > 1)}")
