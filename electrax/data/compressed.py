"""Files that may be compressed, read in bounded memory."""

import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMPRESSED = (".gz", ".xz", ".zst")
# More bytes than MOST_ALWAYS out of MOST_TIMES fewer are taken for an attack; text gives 3 to 20 times as many.
MOST_ALWAYS, MOST_TIMES = 256 << 20, 250


class BrokenData(Exception):
    """Compressed data that ends too early, is damaged, or unfolds to more than it can honestly hold."""


@contextlib.contextmanager
def open_decompressed(path: str | os.PathLike) -> Iterator[tuple[io.FileIO, io.BufferedReader]]:
    """A file, and the bytes that it unfolds to. Raises OSError where it cannot be read; reading from it within the
    block raises that too, and BrokenData."""
    try:
        with (
            open(path, "rb", buffering=0) as raw,
            io.BufferedReader(_unfolded(raw, Path(path).suffix), 1 << 18) as file,
        ):
            yield raw, file
    except (EOFError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
        raise BrokenData(str(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise BrokenData(str(error)) from None  # gzip.BadGzipFile


def _unfolded(raw: io.FileIO, suffix: str) -> io.RawIOBase:
    match suffix:
        case ".gz":
            return _Measured(raw, gzip.open(raw))
        case ".xz":
            return _Measured(raw, lzma.open(raw))
        case ".zst":
            return _Measured(raw, _Zstandard(raw))
        case _:
            return raw


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


class _Measured(io.RawIOBase):
    """The decompressed `data` of a file, up to a bound on what so many bytes of it can honestly hold."""

    def __init__(self, raw: io.FileIO, data: Any):
        self._raw, self._data, self._size = raw, data, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._data.readinto(buffer)
        self._size += size
        if self._size > max(MOST_ALWAYS, MOST_TIMES * self._raw.tell()):
            raise EOFError(f"more than {MOST_TIMES} times the bytes it is made of")
        return size


class _Zstandard(io.RawIOBase):
    """Decompresses frame after frame. The library's own reader takes a truncated file for a complete one.

    Input goes in by the kilobyte because one call returns all its output: at most 128 KiB for every 4 bytes.
    """

    def __init__(self, raw: io.FileIO):
        self._raw = io.BufferedReader(raw, 1 << 18)
        self._frame, self._input, self._output = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._output:
            data = self._input or self._raw.read(1024)
            if not data:
                if self._frame is not None:
                    raise EOFError("ended within a zstandard frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._output, self._input = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size
