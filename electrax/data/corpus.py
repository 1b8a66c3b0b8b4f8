"""A prepared corpus on the disk: shards of token rows and one manifest. `prepare.py` writes it, this reads it."""

import hashlib
import importlib.resources
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from electrax.config import AnyPath, UserError
from electrax.data.outside import is_file_name, read_value
from electrax.data.tokenizer import SPECIAL_NAMES, Tokenizer
from electrax.storage import file_sha256, files_below, is_remote, new_directory, own_cache, path_of

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of rows, without a header."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of "train" or "valid"; all but the last hold the same number of rows. `tokens` leaves out padding."""

    rows: int
    tokens: int
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a corpus holds; `config` is the command that made it, less what does not change its bytes."""

    format_version: int
    tokenizer_sha256: str
    vocab_size: int
    special_ids: dict[str, int]
    layout: str
    max_length: int
    dtype: str
    splits: dict[str, Split]
    counts: dict
    config: dict

    def dumps(self) -> str:
        """The manifest as JSON, with a checksum of itself."""
        content = asdict(self)
        return json.dumps(content | {"sha256": _checksum(content)}, indent=1)

    def check(self) -> None:
        """Raises ValueError naming what is not as `prepare` writes it: shards may only lie in the corpus itself, and
        what is said of them must fit together, since rows are found by it."""
        sizes = {"vocab_size": (1, 2**31), "max_length": (1, 2**20)}
        for key, (least, end) in sizes.items():
            _expect(_is_count(getattr(self, key), least, end), key)
        _expect(self.dtype in ("uint16", "uint32"), "dtype")
        _expect(all(isinstance(text, str) for text in (self.tokenizer_sha256, self.layout)), "tokenizer_sha256, layout")
        ids = self.special_ids
        _expect(isinstance(ids, dict) and ids.keys() == SPECIAL_NAMES.keys(), "special_ids")
        _expect(all(_is_count(number, 0, self.vocab_size) for number in ids.values()), "special_ids")
        _expect(isinstance(self.counts, dict) and isinstance(self.config, dict), "counts, config")
        for name, split in self.splits.items():
            counts = (split.rows, split.tokens, split.documents, *(shard.rows for shard in split.shards))
            _expect(all(_is_count(number, 0, 2**63) for number in counts), f"splits.{name}")
            for shard in split.shards:
                _expect(is_file_name(shard.file), f"splits.{name}: the shard {shard.file!r}")
                _expect(isinstance(shard.sha256, str), f"splits.{name}: the shard {shard.file!r}")
            rows = [shard.rows for shard in split.shards] or [0]
            fit = set(rows[:-1]) <= {rows[0]} and rows[-1] <= rows[0] and (0 not in rows or not split.shards)
            _expect(fit and sum(rows) == split.rows, f"splits.{name}: the rows of its shards")

    @staticmethod
    def read(directory: str | AnyPath) -> "Manifest":
        """Raises UserError naming the file if it is missing, is no manifest or has another format version."""
        path = path_of(directory) / MANIFEST_FILE
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a directory made by `electrax prepare`")
        raw = read_value(path)
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: expected format_version {FORMAT_VERSION}, found {version}; prepare the text again"
            )
        if raw.pop("sha256", None) != _checksum(raw):
            raise UserError(f"{path}: damaged (it does not fit its own checksum); prepare the text again")
        try:
            raw["splits"] = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in raw["splits"].items()
            }
            manifest = Manifest(**raw)
            manifest.check()
            return manifest
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: not a manifest of format {FORMAT_VERSION} ({error})") from None


def _checksum(content: dict) -> str:
    """Of what a manifest says."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _is_count(value: object, least: int, end: int) -> bool:
    return type(value) is int and least <= value < end


def _expect(true: bool, what: str) -> None:
    if not true:
        raise ValueError(f"{what}: not as `prepare` writes it")


class Corpus:
    """Token rows by number, memory-mapped."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._maps = {name: [self._map(shard) for shard in split.shards] for name, split in manifest.splits.items()}

    @staticmethod
    def open(directory: str | AnyPath) -> "Corpus":
        """Open what `prepare` wrote; from a bucket it is copied into the user's cache first. A missing shard or one of
        the wrong size is a UserError; see also `verify`."""
        manifest = Manifest.read(directory)
        path = path_of(directory)
        return Corpus(_fetched(path) if is_remote(path) else path, manifest)

    def size(self, split: str) -> int:
        """Number of rows; a split that does not exist is a UserError."""
        if split not in self.manifest.splits:
            raise UserError(f"{self.directory}: expected the split {' or '.join(self.manifest.splits)}, not {split!r}")
        return self.manifest.splits[split].rows

    def rows(self, split: str, indices: Int64[np.ndarray, " B"]) -> Shaped[np.ndarray, "B L"]:
        """The rows `indices`, uint16 or uint32; a negative index (see `eval_batches`) gives a row of padding."""
        size = self.size(split)
        if len(indices) and indices.max() >= size:
            raise IndexError(f"row {indices.max()} of {size} in the split {split!r} of {self.directory}")
        shape = (len(indices), self.manifest.max_length)
        out = np.full(shape, self.manifest.special_ids["pad"], self.manifest.dtype)
        if not size:
            return out
        shards, places = np.divmod(indices, self.manifest.splits[split].shards[0].rows)
        for shard in np.unique(shards[indices >= 0]):
            here = np.flatnonzero(shards == shard)
            out[here] = self._maps[split][shard][places[here]]
        return out

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the rows; a UserError if the file is not the one that made them."""
        tokenizer = Tokenizer.load(self.directory)
        if tokenizer.sha256 != self.manifest.tokenizer_sha256:
            path = self.directory / tokenizer.file_name
            raise UserError(f"{path}: the tokenizer is not the one the rows were made with (sha256 differs)")
        return tokenizer

    def verify(self) -> None:
        """Read every shard and compare its checksum; a difference is a UserError naming the shard."""
        shards = [shard for split in self.manifest.splits.values() for shard in split.shards]
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock to the others
            found = pool.map(lambda shard: file_sha256(self.directory / shard.file), shards)
            for shard, sha256 in zip(shards, found, strict=True):
                if sha256 != shard.sha256:
                    raise UserError(f"{self.directory / shard.file}: damaged (its sha256 is not the manifest's)")

    def _map(self, shard: Shard) -> np.ndarray:
        path, dtype = self.directory / shard.file, np.dtype(self.manifest.dtype)
        expected = shard.rows * self.manifest.max_length * dtype.itemsize
        if not path.is_file():
            raise UserError(f"{path}: missing; the manifest names it")
        if path.stat().st_size != expected:
            raise UserError(f"{path}: expected {expected} bytes, found {path.stat().st_size}")
        try:
            return np.memmap(path, dtype, mode="r", shape=(shard.rows, self.manifest.max_length))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _fetched(remote: AnyPath) -> Path:
    """The copy of a prepared directory that is kept in the cache, made where it is not there yet."""
    kept = own_cache("corpora") / file_sha256(remote / MANIFEST_FILE)[:32]
    if not kept.is_dir():
        try:
            with new_directory(kept) as folder:
                for name, source in files_below(remote).items():
                    if is_file_name(name):  # `prepare` makes no folders
                        with source.open("rb") as theirs, (folder / name).open("wb") as ours:
                            shutil.copyfileobj(theirs, ours, 1 << 20)
        except UserError:
            if not kept.is_dir():  # no other process of this machine has copied it meanwhile
                raise
    return kept


def sample_path() -> Path:
    """The bundled sample text, four books in the public domain; see SAMPLE.md beside it."""
    return Path(str(importlib.resources.files("electrax.data") / "sample.txt.xz"))
