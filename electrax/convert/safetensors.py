"""Safetensors files, read without copies and written with a checksum where one is wanted.

Each array is a read-only view of a memory map of its own: whoever drops it gives its memory back.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from electrax.config import UserError
from electrax.data.outside import parse_json as parse_value
from electrax.storage import sync_directory

DTYPES = {
    **{"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16")},
    **{"BF16": np.dtype(jnp.bfloat16), "BOOL": np.dtype("bool")},
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # as of the reference implementation
MAX_DIMENSIONS = 64  # numpy's
BLANK = "0" * 64  # stands in a header for the checksum while that is computed


class Stored(NamedTuple):
    """Where in a file the bytes of an array begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def mapped(path: pathlib.Path, name: str, stored: Stored) -> np.ndarray:
    """An array of a file; float16 and bfloat16 as float32. Raises UserError where numpy cannot have such a one."""
    try:
        if 0 in stored.shape:
            return np.zeros(stored.shape, _widened(stored.dtype))
        array = np.asarray(np.memmap(path, stored.dtype, "r", stored.offset, stored.shape))
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(f"{path}: the tensor {name!r} cannot be read ({error})") from None
    return array.astype(_widened(stored.dtype), copy=False)


def _widened(dtype: np.dtype) -> np.dtype:
    return DTYPES["F32"] if dtype in (DTYPES["F16"], DTYPES["BF16"]) else dtype


# -- reading -----------------------------------------------------------------------------------------------------------


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors. Raises UserError where the header is damaged, or is not that of so much data."""
    return {name: mapped(path, name, stored) for name, stored in read_header(path)[0].items()}


def read_checked(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file with a checksum, and its metadata. Raises UserError where a bit of it has changed."""
    tensors, metadata, header = read_header(path)
    found = metadata.get("sha256")
    if found is None:
        raise UserError(f"{path}: has no checksum; expected a file that electrax wrote")
    digest = hashlib.sha256(header.replace(_checksum(found), _checksum(BLANK), 1))
    with open(path, "rb") as file:
        file.seek(len(header))
        hashlib.file_digest(file, lambda: digest)
    if digest.hexdigest() != found:
        raise UserError(f"{path}: damaged (its sha256 is not the one written in it)")
    return {name: mapped(path, name, stored) for name, stored in tensors.items()}, metadata


def read_header(path: pathlib.Path) -> tuple[dict[str, Stored], dict[str, str], bytes]:
    """Where the tensors are, the metadata, and all bytes before the tensors."""
    try:
        with open(path, "rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{path}: not safetensors, or cut short (a header of {length} bytes in {size})")
            header = start + file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    content = parse_json(path, header[8:])
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: expected texts in the __metadata__ of its header")
    tensors = {name: _stored(path, name, entry, len(header)) for name, entry in content.items()}
    at = len(header)
    for stored, end in sorted(tensors.values(), key=lambda part: (part[0].offset, part[1])):
        if stored.offset != at:
            raise UserError(f"{path}: its header leaves out bytes of its data, or has two tensors in one place")
        at = end
    if at != size:
        raise UserError(f"{path}: expected {at - len(header)} bytes after its header, not {size - len(header)}")
    return {name: stored for name, (stored, _) in tensors.items()}, metadata, header


def _stored(path: pathlib.Path, name: str, entry: Any, first: int) -> tuple[Stored, int]:
    """Where a tensor is and where it ends."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: expected a dtype, a shape and two data_offsets of {name!r}") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: {name!r} has the dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not (is_shape(shape) and is_shape([begin, end]) and end - begin == math.prod(shape) * DTYPES[dtype].itemsize):
        raise UserError(f"{path}: the shape and the data_offsets of {name!r} do not fit together")
    return Stored(DTYPES[dtype], tuple(shape), first + begin), first + end


def is_shape(shape: Any) -> bool:
    """Whether it is a list of not too many numbers, none below 0."""
    return isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)


def parse_json(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    """The object of a JSON text out of a file. Raises UserError where it is none, or has a key twice."""
    try:
        content = parse_value(text.decode("utf-8"), unique)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of JSON")
    return content


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dictionary. Raises ValueError where a name comes twice."""
    known: dict[str, Any] = {}
    for name, value in pairs:
        if name in known:
            raise ValueError(f"{name!r} is there twice")
        known[name] = value
    return known


# -- writing -----------------------------------------------------------------------------------------------------------


def write_safetensors(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    checksum: bool = False,
) -> None:
    """Replace a file by these tensors, all or nothing.

    The checksum in the metadata is that of all bytes of the file, with zeros in its own place."""
    # the widest first, as the reference implementation has them: so each begins at a multiple of its width
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    said, at = {**(metadata or {}), **({"sha256": BLANK} if checksum else {})}, 0
    content: dict[str, Any] = {"__metadata__": said} if said else {}
    for name in names:
        array, begin = tensors[name], at
        at += array.nbytes
        content[name] = {"dtype": CODES[array.dtype], "shape": array.shape, "data_offsets": (begin, at)}
    header = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(header)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(header)
        for name in names:
            data = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)
            file.write(data)
            if checksum:
                digest.update(data)
        if checksum:
            file.seek(header.index(_checksum(BLANK)))
            file.write(_checksum(digest.hexdigest()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def _checksum(digest: str) -> bytes:
    """As it stands in a header."""
    return f'"sha256":"{digest}"'.encode()
