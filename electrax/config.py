"""TOML file + dotted overrides -> frozen dataclasses, with errors that name the key and the nearest right one."""

import dataclasses
import difflib
import json
import os
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


class UserError(Exception):
    """Wrong input from outside: one line that names the file, line or key and what was expected.

    The command line prints it without a traceback and exits with status 2.
    """


def shipped_configs() -> pathlib.Path:
    """The folder of shipped configs: inside the package when installed, beside it in a checkout."""
    package = pathlib.Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str, kind: str) -> pathlib.Path:
    """A path to a file, or the bare name of a shipped config of this kind (`pretrain`, `finetune`)."""
    path = pathlib.Path(name)
    if path.is_file():
        return path
    folder = shipped_configs() / kind
    shipped = folder / f"{name}.toml"
    if shipped.is_file():
        return shipped
    names = sorted(p.stem for p in folder.glob("*.toml"))
    raise UserError(f"{name}: no such file, and no shipped config of that name; shipped: {', '.join(names)}")


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """The file's keys over those of the file that its `base` names (relative to it), if any."""
    path = pathlib.Path(path)
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    base = own.pop("base", "")
    if not base:
        return own
    parent = path.parent / base
    if parent.resolve() == path.resolve():
        raise UserError(f"{path}: base names the file itself")
    return merge(read_toml(parent), own)


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables are merged; any other value of `high` replaces that of `low`."""
    result = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--a.b 1 --c=x --flag` -> {"a": {"b": 1}, "c": "x", "flag": True}. Values are read as TOML, else as text."""
    result: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word}: expected --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        nested: Any = _parse_value(value)
        for part in reversed(key.replace("-", "_").split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(cls: type[Config], values: Mapping[str, Any], origin: str, prefix: str = "") -> Config:
    """A (nested) dataclass from plain values. Raises UserError for an unknown key or a value of the wrong type;
    `origin` says in the message where the values come from."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1, cutoff=0.5)
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(fields)}"
        raise UserError(f"{origin}: unknown key {prefix}{unknown[0]}; {hint}")
    arguments = {key: _convert(hints[key], value, origin, prefix + key) for key, value in values.items()}
    return cls(**arguments)


def _convert(hint: Any, value: Any, origin: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{origin}: {key} is a section; set one of its keys, as in --{key}.NAME value")
        return build(hint, value, origin, key + ".")
    expected = None
    kind = typing.get_origin(hint)
    if kind is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        expected = f"one of {', '.join(map(str, choices))}"
    elif kind is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(typing.get_args(hint)[0], item, origin, key) for item in value)
        expected = "a list"
    elif kind in (types.UnionType, typing.Union):
        return value if value is None else _convert(next(iter(typing.get_args(hint))), value, origin, key)
    elif hint is str:
        # a path or name that happens to read as a number
        return value if isinstance(value, str) else str(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif type(value) is hint:
        return value
    expected = expected or {int: "a whole number", float: "a number", bool: "true or false"}[hint]
    raise UserError(f"{origin}: {key} is {json.dumps(value, default=str)}, but must be {expected}")


def load(cls: type[Config], path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Defaults < base < file < overrides. Each source is checked by itself, so that an error names the right one."""
    from_file, from_line = read_toml(path), parse_overrides(overrides)
    build(cls, from_line, "command line")
    build(cls, from_file, str(path))
    return build(cls, merge(from_file, from_line), str(path))


def to_toml(config: Any) -> str:
    """Every field of a config as TOML that `load` reads back to an equal config."""
    lines, sections = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            sections.append(f"\n[{field.name}]\n{to_toml(value)}")
        elif value is not None:
            lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines + sections)
