"""Writing so that a killed process leaves either the old bytes or the new ones."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from electrax.config import UserError
from electrax.data.corpus import Shard, file_sha256


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
            _write_all(self._file, some.tobytes())
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


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by `text`, all or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link that somebody left there must not be followed
    with open(temporary, "xb", buffering=0) as file:
        _write_all(file, text.encode())
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def sync_directory(path: Path) -> None:
    """Make the names in a directory last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path, work: str) -> Iterator[None]:
    """Two runs in one directory would spoil each other's files: the second gets a UserError that names the `work`."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{directory}: another {work} is at work in it") from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, for its user alone, which becomes `path` when all is written. UserError where
    something is there, and for whatever the system refuses meanwhile."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already; expected a new or empty directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o700
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            made.chmod(mode)
            yield made
            os.replace(made, path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
