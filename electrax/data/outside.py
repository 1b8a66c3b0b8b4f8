"""What is asked of things from outside before they are used: sizes, JSON within limits, names, and folders."""

import json
import os
from collections.abc import Callable
from typing import Any

from electrax.config import MAX_DEPTH, UserError, is_deeper
from electrax.storage import path_of

MAX_DOCUMENT_BYTES = 1 << 30  # of a file that is read as one value
MAX_DESCRIPTION_BYTES = 64 << 20  # of a small file that describes others: config.json, a manifest, an index


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON value (UTF-8), whose objects are made by `pairs`. ValueError for all else: broken, or too deep."""
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return value


def read_bytes(path: str | os.PathLike, most: int = MAX_DESCRIPTION_BYTES) -> bytes:
    """A whole file. UserError where it cannot be read, or holds more."""
    try:
        with path_of(path).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{os.fspath(path)}: expected the name of a file, without a NUL character") from None
    if len(data) > most:
        raise UserError(f"{os.fspath(path)}: expected at most {most:,} bytes")
    return data


def read_value(path: str | os.PathLike) -> Any:
    """The JSON value in a small file. UserError for all else."""
    try:
        return parse_json(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: not JSON ({error})") from None


def read_object(path: str | os.PathLike, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """The JSON object in a small file, which has at least these keys, each of its type. UserError for all else."""
    value = read_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{os.fspath(path)}: not an object of JSON")
    for key, kind in types.items():
        if not isinstance(value.get(key), kind) or (isinstance(value[key], bool) and kind is not bool):
            raise UserError(f"{os.fspath(path)}: {key!r} is missing or of a wrong type")
    return value


def is_file_name(name: Any) -> bool:
    """Whether it is the name of something right in a folder, and no path that could lead out of it."""
    is_name = isinstance(name, str) and name not in ("", ".", "..") and not any(c in name for c in "/\\\0")
    return is_name and os.path.basename(name) == name
