"""The rows of CSV, TSV, JSON-lines and Parquet files, plain lines and TFDS datasets, as columns with values."""

import collections
import csv
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electrax.config import UserError
from electrax.data.compressed import COMPRESSED
from electrax.data.examples import MAX_LINE_BYTES, Fault, Line, read_lines, short
from electrax.data.outside import parse_json
from electrax.data.readers import TFDS_PREFIX, find_sources

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
DOCUMENT = re.compile(r"\[\s*(\{|$)|\{$")  # how JSON begins that is one value, not one a line
NO_OBJECT = 100  # lines without one are no JSON lines
OPENING = re.compile(r'(^|\t)"')
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}

Records = Iterator[tuple[str, dict[str, Any] | Fault]]  # (where, columns -> value or what is wrong with the row)


def read_records(path: str, columns: list[str], labelled: bool, tfds_dir: str | None) -> Records:
    """The rows in order, in bounded memory. What is wrong with the file as a whole is a UserError.

    Where all names are numbers, a .csv or .tsv file has no header and they count its columns from 0. A .txt file holds
    one text a line, and no labels. `tfds:NAME[/split]` is looked for in `tfds_dir`.
    """
    if not columns:
        raise UserError(f"{path}: expected the name of at least one text column")
    if path.startswith(TFDS_PREFIX):
        return _tfds_records(path, columns, tfds_dir)
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in COMPRESSED]
    match suffixes[-1].lower() if suffixes else "":
        case ".csv":
            return _csv_records(path, columns, ",")
        case ".tsv":
            return _csv_records(path, columns, "\t")
        case ".jsonl" | ".json":
            return _json_records(path)
        case ".parquet":
            return _parquet_records(path, columns)
        case ".txt":
            if len(columns) > 1 or labelled:
                raise UserError(f"{path}: a .txt file holds one text a line and no labels; expected another kind of "
                                f"file for the columns {', '.join(columns)}")  # fmt: skip
            return _text_records(path, columns[0])
    raise UserError(f"{path}: expected a name that ends in {', '.join(KINDS)}, or tfds:NAME")


def missing_column(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(map(short, names[:20])) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    return f"no column {name!r}; {hint}its columns are {shown or 'none'}"


# -- separated values --------------------------------------------------------------------------------------------------


def _csv_records(path: str, columns: list[str], delimiter: str) -> Records:
    rows = _tab_cells(path) if delimiter == "\t" else _cells(path, delimiter)
    width, places = 0, {}
    if all(name.isdigit() for name in columns):
        places = {name: int(name) for name in columns}
    else:
        first, _, header = next(rows, (0, 0, []))
        if isinstance(header, Fault):
            raise UserError(f"{path}, line {first}: {header.message}")
        width, places = len(header), _places(path, columns, header, delimiter)
    for first, last, cells in rows:
        where = f"{path}, line {first}"
        if not width and isinstance(cells, list):  # the first row of a file without a header
            width = len(cells)
            if max(places.values()) >= width:
                raise UserError(f"{where}: expected at least {max(places.values()) + 1} columns, found {width}")
        if isinstance(cells, list) and len(cells) != width:
            lines = f" in lines {first} to {last} (quotation marks?)" if last > first else ""
            cells = Fault("ragged row", f"expected {width} cells, found {len(cells)}{lines}")
        yield where, cells if isinstance(cells, Fault) else {name: cells[place] for name, place in places.items()}


def _places(path: str, columns: list[str], header: list[str], delimiter: str) -> dict[str, int]:
    if not header:
        raise UserError(f"{path}: expected a header with the columns {', '.join(columns)}, found an empty file")
    for name in columns:
        if header.count(name) > 1:
            raise UserError(f"{path}: expected one column {name!r}, found {header.count(name)}")
        if name not in header:
            others = [words for other, words in DELIMITERS.items() if other != delimiter and other in header[0]]
            hint = f" (cells here are told apart by {DELIMITERS[delimiter]}; these by {others[0]}?)" if others else ""
            raise UserError(f"{path}: {missing_column(name, header)}{hint if len(header) == 1 else ''}")
    return {name: header.index(name) for name in columns}


def _tab_cells(path: str) -> Iterator[tuple[int, int, list[str] | Fault]]:
    """As `_cells`, but a quotation mark is text where it does not begin a cell, where none ends that cell, or where
    each line of the quoted row has as many cells as the file has columns, and so is a row by itself."""
    lines, ahead, width = read_lines(path), collections.deque[Line](), 0

    def pull() -> Line | None:
        return ahead.popleft() if ahead else next(lines, None)

    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    while line := pull():
        taken, quoted = [line], None
        if OPENING.search(line.text) and not line.fault:
            taken, quoted = _quoted_row(line, pull)
        if quoted is None or (width > 1 and all(each.text.count("\t") == width - 1 for each in taken)):
            ahead.extendleft(reversed(taken[1:]))
            taken, text = [line], line.text.rstrip("\r\n")
            quoted = [_unquoted(cell) for cell in text.split("\t")] if text else []
        fault = next((each.fault for each in taken if each.fault), None)
        if fault or quoted:
            width = width or len(quoted)
            yield line.number, taken[-1].number, fault or quoted


def _quoted_row(first: Line, pull: Callable[[], Line | None]) -> tuple[list[Line], list[str] | None]:
    """The lines that were read of a row with quoted cells, and the cells; None where those are not quoted well."""
    taken: list[Line] = []

    def feed() -> Iterator[str]:
        size, line = 0, first
        while line and size <= 2 * MAX_LINE_BYTES:
            taken.append(line)
            size += len(line.text)
            yield line.text
            line = pull()

    try:
        return taken, next(csv.reader(feed(), delimiter="\t", strict=True))
    except csv.Error:
        return taken, None


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner else cell


def _cells(path: str, delimiter: str) -> Iterator[tuple[int, int, list[str] | Fault]]:
    """(first line, last line, cells) of each row that is not blank. A row with a fault in one of its lines has the
    fault instead; a quoted cell may hold newlines."""
    faults: list[Fault] = []
    ended, size = False, 0

    def feed() -> Iterator[str]:
        nonlocal ended, size
        for line in read_lines(path):
            if line.fault:
                faults.append(line.fault)
            size += len(line.text)
            if size > max(2 * MAX_LINE_BYTES, len(line.text)):  # cell after cell with line after line in each
                raise UserError(f"{path}, line {line.number}: expected a row to end within {2 * MAX_LINE_BYTES >> 20} "
                                "MiB (a stray quotation mark?)")  # fmt: skip
            yield line.text
        ended = True

    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))  # the library's own limit is 128 KiB
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        first, cells, size = reader.line_num + 1, None, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if ended or "field limit" in str(error):
                raise UserError(f"{path}, line {first}: expected a cell to end, found none that does in "
                                f"{reader.line_num - first + 1} lines (a stray quotation mark?)") from None  # fmt: skip
            faults.append(Fault("quotes", f"expected cells that are quoted as a whole or not at all ({error})"))
        if faults or cells:
            yield first, reader.line_num, faults[0] if faults else cells
        faults.clear()


# -- other kinds of file -----------------------------------------------------------------------------------------------


def _text_records(path: str, column: str) -> Records:
    for line in read_lines(path):
        yield f"{path}, line {line.number}", line.fault or {column: line.text.rstrip("\r\n")}


def _json_records(path: str) -> Records:
    """A file of another kind is refused before its first record: bad lines wait for the first that looks like one."""
    waiting: list[tuple[str, Fault]] = []
    refusal, begun = "", False
    for line in read_lines(path):
        text, where = line.text.strip(), f"{path}, line {line.number}"
        if not text and not line.fault:
            continue
        record = line.fault or _json_object(text)
        found = line.fault.message if line.fault else f"expected one JSON object a line, found {short(text)}"
        refusal = refusal or f"{where}: {found}"
        if not begun and not line.fault and DOCUMENT.match(text):
            raise UserError(refusal)
        if begun or text.startswith("{"):
            yield from waiting
            yield where, record
            waiting, begun = [], True
            continue
        waiting.append((where, record))
        if len(waiting) == NO_OBJECT:
            raise UserError(refusal)
    if waiting:
        raise UserError(refusal)


def _json_object(text: str) -> dict[str, Any] | Fault:
    try:
        value = parse_json(text)
    except ValueError as error:
        return Fault("JSON", f"expected one JSON object a line ({error})")
    return value if isinstance(value, dict) else Fault("JSON", f"expected a JSON object, found {short(value)}")


def _parquet_records(path: str, columns: list[str]) -> Records:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs another library: pip install pyarrow") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in columns:
                if names.count(name) > 1:
                    raise UserError(f"{path}: expected one column {name!r}, found {names.count(name)}")
                if name not in names:
                    raise UserError(f"{path}: {missing_column(name, names)}")
            for batch in file.iter_batches(1024, columns=list(dict.fromkeys(columns))):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file leads pyarrow into errors of many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}, after row {row}: expected a Parquet file ({reason})") from None


def _tfds_records(path: str, columns: list[str], tfds_dir: str | None) -> Records:
    data = find_sources((path,), tfds_dir=tfds_dir)[0]._open()
    features = data.dataset_info.features
    for name in columns:
        if name not in features:
            raise UserError(f"{path}: {missing_column(name, list(features))}")
    for number in range(len(data)):
        record = data[number]
        yield f"{path}, example {number}", {name: _named(features[name], record[name]) for name in columns}


def _named(feature: Any, value: Any) -> Any:
    """A class label's name for its number, None for TFDS's -1 (no label); any other value as it is."""
    if not hasattr(feature, "int2str"):
        return value
    if np.ndim(value):
        return [feature.int2str(int(item)) for item in value]
    return feature.int2str(int(value)) if value >= 0 else None
