"""Text sources -> a stream of lines with document ends, in bounded memory."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from electrax.config import UserError
from electrax.data.compressed import COMPRESSED, BrokenData, open_decompressed
from electrax.data.outside import parse_json, read_value
from electrax.storage import on_this_machine

TFDS_PREFIX = "tfds:"


class End:
    """Stands in the stream of lines where a document ends."""


END = End()
OnBadInput = Literal["error", "skip"]
Documents = Literal["blank_line", "file"]


@dataclass(frozen=True)
class FileSource:
    """A text or JSON-lines file, perhaps compressed. `lines` may be called again; `fingerprint` is JSON-able."""

    name: str
    documents: Documents = "blank_line"
    text_field: str = "text"
    max_line_bytes: int = 16 << 20

    def size(self) -> int:
        return os.path.getsize(self.name)

    def fingerprint(self) -> list:
        stat = os.stat(self.name)
        return [self.name, stat.st_size, stat.st_mtime_ns]

    def lines(self, log: "LineReader") -> Iterator[str | End]:
        """The lines, with END after each document; tells `log` of what it leaves out and how far it has come."""
        path = Path(self.name)
        suffixes = [s for s in path.suffixes if s not in COMPRESSED]
        if suffixes and suffixes[-1] in (".json", ".jsonl"):
            return self._json_documents(log)
        return self._text_documents(log)

    def _text_documents(self, log: "LineReader") -> Iterator[str | End]:
        open_document = False
        for _, text in self._decoded(log):
            if text.strip():
                open_document = True
                yield text
            elif open_document and self.documents == "blank_line":
                open_document = False
                yield END
        if open_document:
            yield END

    def _json_documents(self, log: "LineReader") -> Iterator[str | End]:
        for number, line in self._decoded(log):
            if not line.strip():
                continue
            where = f"{self.name}, line {number}"
            try:
                value = parse_json(line)
            except ValueError as error:
                log.bad("json", f"{where}: expected one JSON object a line ({error})")
                continue
            yield from _field_lines(value, self.text_field, where, log)

    def _decoded(self, log: "LineReader") -> Iterator[tuple[int, str]]:
        """(line number from 1, line without its end)."""
        number = 0
        try:
            with open_decompressed(self.name) as (raw, file):
                while line := file.readline(self.max_line_bytes + 1):
                    number += 1
                    log.position = raw.tell()
                    where = f"{self.name}, line {number}"
                    if b"\0" in line:
                        log.bad("binary", f"{where}: expected UTF-8 text, found a NUL byte (a binary or UTF-16 file?)")
                        return
                    if len(line) > self.max_line_bytes and not line.endswith(b"\n"):
                        log.bad("long_line", f"{where}: longer than max_line_mb ({self.max_line_bytes / 2**20:g} MiB)")
                        while line and not line.endswith(b"\n"):
                            line = file.readline(1 << 20)
                        continue
                    try:
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        byte, column = error.object[error.start], error.start + 1
                        log.bad("utf8", f"{where}, byte {column}: expected UTF-8, found 0x{byte:02x} ({error.reason})")
                        continue
                    yield number, text.rstrip("\r\n")
        except BrokenData as error:
            log.bad("compression", f"{self.name}, after line {number}: truncated or broken compressed data ({error})")
        except OSError as error:
            raise UserError(f"{self.name}, after line {number}: cannot read ({error.strerror})") from None


@dataclass(frozen=True)
class TfdsSource:
    """A prepared TensorFlow dataset in ArrayRecord files, read without TensorFlow; an example is a document."""

    name: str
    directory: Path
    split: str
    text_field: str = "text"

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.directory.iterdir())

    def fingerprint(self) -> list:
        stat = os.stat(self.directory / "dataset_info.json")
        return [self.name, str(self.directory), self.split, stat.st_size, stat.st_mtime_ns]

    def lines(self, log: "LineReader") -> Iterator[str | End]:
        """As FileSource's."""
        data, size = self._open(), self.size()
        for number in range(len(data)):
            log.position = size * (number + 1) // len(data)
            yield from _field_lines(data[number], self.text_field, f"{self.name}, example {number}", log)

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        _check_features(self.directory / "features.json")
        try:
            builder = tfds.builder_from_directory(self.directory)
            if self.split not in builder.info.splits:
                raise UserError(f"{self.name}: expected one of the splits {', '.join(builder.info.splits)}")
            return builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise UserError(f"{self.name}: expected ArrayRecord files in {self.directory}; prepare the dataset with "
                            'file_format="array_record"') from None  # fmt: skip


Source = FileSource | TfdsSource


class LineReader:
    """Reads sources one after another and keeps count of what was left out.

    `skipped` counts by kind, `position` is in bytes of the current source as they lie on the disk. With
    on_bad_input="error" the first bad thing raises UserError instead.
    """

    def __init__(
        self, sources: list[Source], on_bad_input: OnBadInput = "error", skipped: dict[str, int] | None = None
    ):
        self.sources = sources
        self.on_bad_input = on_bad_input
        self.skipped = Counter(skipped)
        self.position = 0

    def read(self, first: int = 0, consumed: int = 0) -> Iterator[tuple[int, int, str | End]]:
        """(source index, items read from that source so far, line or END), from after `consumed` items of `first`."""
        for index in range(first, len(self.sources)):
            source, items = self.sources[index], 0
            before = self.skipped.copy()
            for items, item in enumerate(source.lines(self), 1):
                if index > first or items > consumed:
                    yield index, items, item
                elif items == consumed:  # what was left out up to here is counted already
                    self.skipped = before.copy()
            if items == 0:
                self.bad("empty", f"{source.name}: expected text, found none")

    def bad(self, kind: str, message: str) -> None:
        """Count what a source leaves out, or refuse it."""
        if self.on_bad_input == "error":
            raise UserError(message)
        self.skipped[kind] += 1


def find_sources(
    texts: tuple[str, ...],
    documents: Documents = "blank_line",
    text_field: str = "text",
    max_line_bytes: int = 16 << 20,
    tfds_dir: str | None = None,
) -> list[Source]:
    """The inputs named by files, folders (recursive), globs and `tfds:NAME[/split]`, each in sorted order.

    A name that leads to nothing is a UserError.
    """
    sources: list[Source] = []
    for text in texts:
        if text.startswith(TFDS_PREFIX):
            sources.append(_find_tfds(text, text_field, tfds_dir))
        else:
            sources += [FileSource(name, documents, text_field, max_line_bytes) for name in _find_files(text)]
    return sources


def _find_files(text: str) -> list[str]:
    path = on_this_machine(text, "text")
    if path.is_dir():
        names = [str(p) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
        expected = "a folder with files in it"
    elif path.exists():
        names, expected = [text], ""
    else:
        names = [name for name in glob.glob(text, recursive=True) if os.path.isfile(name)]
        expected = "a file, a folder or a glob that matches files"
    if not names:
        raise UserError(f"{text}: expected {expected}")
    for name in names:
        if not os.access(name, os.R_OK):
            raise UserError(f"{name}: no permission to read it")
    return sorted(names)


def _find_tfds(text: str, text_field: str, tfds_dir: str | None) -> TfdsSource:
    """Looks for the prepared directory itself: the library would try the network first, for minutes."""
    root = Path(tfds_dir or os.path.join("~", "tensorflow_datasets")).expanduser()
    name = text.removeprefix(TFDS_PREFIX)
    dataset, _, last = name.rpartition("/")
    for folder, split in ((name, "train"), (dataset, last)):
        infos = sorted((root / folder).glob("*/dataset_info.json")) if folder else []
        if (root / folder / "dataset_info.json").exists() and folder:
            infos = [root / folder / "dataset_info.json"]
        if infos:
            newest = max(infos, key=lambda info: [int(n) if n.isdigit() else -1 for n in info.parent.name.split(".")])
            return TfdsSource(text, newest.parent, split, text_field)
    raise UserError(f"{text}: expected a prepared dataset in {root / name}; prepare it there with "
                    'file_format="array_record", or name its folder with tfds_dir')  # fmt: skip


def _check_features(path: Path) -> None:
    """The library imports whatever module the name of a feature's class says: only its own are let in."""
    layer = [read_value(path)] if path.is_file() else []
    while layer:
        holder = layer.pop()
        items = holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()
        layer += items
        for key in ("pythonClassName", "python_class_name", "type") if isinstance(holder, dict) else ():
            name = holder.get(key)
            if isinstance(name, str) and "." in name and not name.startswith("tensorflow_datasets."):
                raise UserError(f"{path}: expected a feature of tensorflow_datasets, found {name!r}")


def _field_lines(value: Any, field: str, where: str, log: "LineReader") -> Iterator[str | End]:
    """One document from one record: the lines of its text field."""
    if not isinstance(value, dict):
        log.bad("json", f"{where}: expected a JSON object, found {type(value).__name__}")
        return
    text = value.get(field)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            log.bad("utf8", f"{where}, byte {error.start + 1}: expected UTF-8 in field {field!r} ({error.reason})")
            return
    if not isinstance(text, str):
        fields = ", ".join(map(repr, value)) or "none"
        found = f"a {type(text).__name__}" if field in value else f"the fields {fields}"
        log.bad("field", f"{where}: expected text in field {field!r}, found {found}")
        return
    try:
        text.encode()  # JSON can spell what no UTF-8 can
    except UnicodeEncodeError:
        log.bad("utf8", f"{where}: expected text in field {field!r}, found half a surrogate pair")
        return
    lines = [line for line in text.split("\n") if line.strip()]
    yield from lines
    if lines:
        yield END
