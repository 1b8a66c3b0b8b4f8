"""The trees of arrays that Flax writes as msgpack, read without copies and without executing what a file says."""

import math
import mmap
import pathlib
import reprlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from electrax.config import UserError
from electrax.convert.safetensors import DTYPES, MAX_DIMENSIONS, Stored, is_shape, mapped, unique

FLAX_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}
CHUNKED = "__msgpack_chunked_array__"  # of an array above 1 GiB, which Flax cuts into flat ones
MAX_DEPTH = 32  # a tensor of BERT is 8 deep
LONGEST_KEY = 1024  # characters; a tensor's name has all those above it, so that a small file could hold very long ones
# codes of msgpack: values of no length; integers of so many bytes; kinds with a length of so many bytes
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
INTEGERS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
KINDS = {
    **{0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("array", 1), 0xC8: ("array", 2)},
    **{0xC9: ("array", 4), 0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4)},
    **{0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)},
}


def read_msgpack(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a model of Transformers in Flax by their names in torch, whose kernels are [out, in].

    Raises UserError where the file is not such a tree, or cut short."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree, end = _unpack(data, 0)
            if end != len(data):
                raise ValueError(f"one of {end} bytes in {len(data)}")
        if not isinstance(tree, dict):
            raise ValueError("something else")
        return unique(_tensors(path, tree))
    except IndexError:
        raise UserError(f"{path}: expected a tree of arrays in msgpack (cut short)") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: expected a tree of arrays in msgpack ({error})") from None


def _tensors(path: pathlib.Path, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, node in tree.items():
        if isinstance(node, dict) and CHUNKED not in node:
            yield from _tensors(path, node, f"{prefix}{key}.")
            continue
        array = _array(path, f"{prefix}{key}", node)
        leaf = "weight" if key in ("kernel", "scale", "embedding") else key
        yield f"{prefix}{leaf}", array.T if key == "kernel" else array


def _array(path: pathlib.Path, name: str, node: Any) -> np.ndarray:
    if isinstance(node, Stored):
        return mapped(path, name, node)
    if not isinstance(node, dict):
        raise ValueError(f"{name!r} is not an array")
    shape, chunks = ([node[part][str(i)] for i in range(len(node[part]))] for part in ("shape", "chunks"))
    return np.concatenate([_array(path, name, chunk) for chunk in chunks]).reshape(shape)


def _unpack(data: mmap.mmap, at: int, depth: int = 0) -> tuple[Any, int]:
    """An object and where it ends: arrays as Stored, bytes as the slice they are.

    Raises ValueError for what Flax does not write, IndexError at the end of the data."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    code, at = data[at], at + 1
    if code < 0x80 or code >= 0xE0:  # a small integer
        return code - 256 * (code >= 0xE0), at
    if code in CONSTANTS:
        return CONSTANTS[code], at
    if code in INTEGERS:
        return _integer(data, at, INTEGERS[code], signed=code >= 0xD0)
    if code < 0xC0:
        kind = "map" if code < 0x90 else "list" if code < 0xA0 else "str"
        length = code & (0x1F if kind == "str" else 0x0F)
    elif 0xD4 <= code <= 0xD8:
        kind, length = "array", 1 << (code - 0xD4)
    elif code in KINDS:
        kind, width = KINDS[code]
        length, at = _integer(data, at, width)
    else:
        raise ValueError(f"the code {code:#x}")
    if kind in ("map", "list"):
        return _unpack_items(data, at, kind, length, depth + 1)
    if kind == "array":
        return _unpack_array(data, at + 1, _within(data, at + 1 + length), depth + 1)
    end = _within(data, at + length)
    return (data[at:end].decode("utf-8") if kind == "str" else slice(at, end)), end


def _within(data: mmap.mmap, end: int) -> int:
    if end > len(data):
        raise IndexError
    return end


def _integer(data: mmap.mmap, at: int, size: int, signed: bool = False) -> tuple[int, int]:
    end = _within(data, at + size)
    return int.from_bytes(data[at:end], "big", signed=signed), end


def _unpack_items(data: mmap.mmap, at: int, kind: str, length: int, depth: int) -> tuple[Any, int]:
    if kind == "list" and length > MAX_DIMENSIONS:
        raise ValueError(f"a list of {length}")
    items: list[Any] = []
    for _ in range(length):
        item, at = _unpack(data, at, depth)
        if kind == "map":
            if not isinstance(item, str) or len(item) > LONGEST_KEY:
                raise ValueError(f"the key {reprlib.repr(item)}")
            value, at = _unpack(data, at, depth)
            item = item, value
        items.append(item)
    return (unique(items) if kind == "map" else items), at


def _unpack_array(data: mmap.mmap, at: int, end: int, depth: int) -> tuple[Stored, int]:
    """Of (shape, name of the dtype, bytes in C order)."""
    (shape, name, content), found = _unpack(data, at, depth)
    if name not in FLAX_DTYPES or not is_shape(shape) or not isinstance(content, slice) or found != end:
        raise ValueError(f"an array of the dtype {name!r} and the shape {shape!r}")
    dtype = FLAX_DTYPES[name]
    if content.stop - content.start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of the shape {shape} has {content.stop - content.start} bytes")
    return Stored(dtype, tuple(shape), content.start), end
