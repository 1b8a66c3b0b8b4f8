"""Rows on the disk: how `prepare` writes them."""

import os
from io import FileIO
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from electrax.config import UserError
from electrax.data.corpus import Shard
from electrax.storage import file_sha256, write_all


class ShardWriter:
    """Appends rows to `SPLIT-00000.bin`, …, `shard_rows` in each, from row `rows` on: what lies beyond is cut off."""

    def __init__(self, directory: Path, split: str, row_bytes: int, shard_rows: int, rows: int):
        self._directory, self._split, self._rows = directory, split, rows
        self._shard_rows = shard_rows
        self._file: FileIO | None = None
        kept = {self._path(i).name for i in range(-(-rows // self._shard_rows))}
        for path in directory.glob(f"{split}-*.bin"):
            if path.name not in kept:
                path.unlink()
        if rows % self._shard_rows:
            path, size = self._path(rows // self._shard_rows), rows % self._shard_rows * row_bytes
            if not path.exists() or path.stat().st_size < size:
                raise UserError(f"{path}: expected at least {size} bytes; remove {directory} and start again")
            os.truncate(path, size)

    def append(self, rows: Shaped[np.ndarray, "N L"]) -> None:
        """Write rows, into as many shards as they fill."""
        while len(rows):
            if self._file is None:
                self._file = open(self._path(self._rows // self._shard_rows), "ab", buffering=0)
            some = rows[: self._shard_rows - self._rows % self._shard_rows]
            write_all(self._file, some.tobytes())
            self._rows, rows = self._rows + len(some), rows[len(some) :]
            if self._rows % self._shard_rows == 0:
                self.close()

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the open shard, if any."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def shards(self) -> tuple[Shard, ...]:
        """The shards written, with their checksums."""
        starts = range(0, self._rows, self._shard_rows)
        sizes = [min(self._shard_rows, self._rows - start) for start in starts]
        paths = [self._path(i) for i in range(len(starts))]
        return tuple(Shard(p.name, n, file_sha256(p)) for p, n in zip(paths, sizes, strict=True))

    def _path(self, index: int) -> Path:
        return self._directory / shard_name(self._split, index)


def shard_name(split: str, index: int) -> str:
    """The file of a split's shard."""
    return f"{split}-{index:05d}.bin"
