"""A prepared corpus on the disk: shards of token rows and one manifest. `prepare.py` writes it, this reads it."""

import hashlib
import importlib.resources
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
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
        """The manifest as JSON."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def read(directory: str | Path) -> "Manifest":
        """Raises UserError naming the file if it is missing, is no manifest or has another format version."""
        path = Path(directory) / MANIFEST_FILE
        try:
            raw = json.loads(path.read_bytes())
        except OSError:
            raise UserError(f"{path}: no such file; expected a directory made by `electrax prepare`") from None
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: expected format_version {FORMAT_VERSION}, found {version}")
        try:
            raw["splits"] = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in raw["splits"].items()
            }
            return Manifest(**raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest of format {FORMAT_VERSION} ({error})") from None


class Corpus:
    """Token rows by number, memory-mapped."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._maps = {name: [self._map(shard) for shard in split.shards] for name, split in manifest.splits.items()}

    @staticmethod
    def open(directory: str | Path) -> "Corpus":
        """Open what `prepare` wrote. A missing shard or one of the wrong size is a UserError; see also `verify`."""
        return Corpus(Path(directory), Manifest.read(directory))

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
            raise UserError(f"{self.directory}: the tokenizer is not the one the rows were made with (sha256 differs)")
        return tokenizer

    def verify(self) -> None:
        """Read every shard and compare its checksum; a difference is a UserError naming the shard."""
        for split in self.manifest.splits.values():
            for shard in split.shards:
                if file_sha256(self.directory / shard.file) != shard.sha256:
                    raise UserError(f"{self.directory / shard.file}: damaged (its sha256 is not the manifest's)")

    def _map(self, shard: Shard) -> np.ndarray:
        path, dtype = self.directory / shard.file, np.dtype(self.manifest.dtype)
        expected = shard.rows * self.manifest.max_length * dtype.itemsize
        if not path.exists():
            raise UserError(f"{path}: missing; the manifest names it")
        if path.stat().st_size != expected:
            raise UserError(f"{path}: expected {expected} bytes, found {path.stat().st_size}")
        return np.memmap(path, dtype, mode="r", shape=(shard.rows, self.manifest.max_length))


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_path() -> Path:
    """The bundled sample text, four books in the public domain; see SAMPLE.md beside it."""
    return Path(str(importlib.resources.files("electrax.data") / "sample.txt.xz"))
