"""TOML file + dotted overrides -> frozen dataclasses, with errors that name the key and the nearest right one."""

import dataclasses
import difflib
import json
import math
import pathlib
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

Config = TypeVar("Config")
# etils' paths of buckets are no Paths, but have of their methods what the package uses
AnyPath = pathlib.Path if TYPE_CHECKING else pathlib.PurePosixPath

LONGEST_MESSAGE = 2000  # characters
MAX_TOML_BYTES = 64 << 10  # the time that tomllib takes for a key of many dots grows with its square
MAX_DEPTH = 64  # of tables and lists in it; whoever walks through them may recurse


class UserError(Exception):
    """Wrong input from outside: one line that names the file, line or key and what was expected.

    The command line prints it without a traceback and exits with status 2. What is quoted of the input can neither
    break the line, nor control the terminal, nor be of any length.
    """

    def __init__(self, message: str):
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", _escaped, message[: LONGEST_MESSAGE + 1])
        super().__init__(line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "…")


def check_seed(seed: int, seeds: int = 1) -> None:
    """Raises UserError where one of `seeds` seeds from that on is no 32 bits without a sign."""
    if not 0 <= seed <= 2**32 - seeds:
        raise UserError(f"seed must lie between 0 and {2**32 - seeds}, not {seed}")


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()


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


def read_toml(path: str | AnyPath, heirs: Sequence[AnyPath] = ()) -> dict[str, Any]:
    """The file's keys over those of the file that its `base` names (relative to it), if any.

    `heirs` are the files whose base this one is; one that names itself, at once or in a circle, is a UserError.
    """
    path = pathlib.Path(path) if isinstance(path, str) else path
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TOML_BYTES + 1)
        if len(text) > MAX_TOML_BYTES:
            raise UserError(f"{path}: expected a config of at most {MAX_TOML_BYTES >> 10} KiB")
        own = _parse_toml(text.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    base = own.pop("base", "")
    if not base:
        return own
    if not isinstance(base, str) or "\0" in base:
        raise UserError(f"{path}: base is {json.dumps(base, default=str)}, but must be the name of a TOML file")
    parent, heirs = path.parent / base, [*heirs, path.resolve()]
    if parent.resolve() in heirs:
        raise UserError(f"{path}: base {base} leads back to the file itself")
    return merge(read_toml(parent, heirs), own)


def _parse_toml(text: str) -> dict[str, Any]:
    """ValueError for what is no TOML, or too deep."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if is_deeper(values, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return values


def is_deeper(value: Any, most: int) -> bool:
    """Whether dictionaries and lists lie in one another more than `most` deep."""
    layer = [value]
    for _ in range(most):
        holders = (item.values() if isinstance(item, dict) else item for item in layer if isinstance(item, dict | list))
        layer = [item for holder in holders for item in holder]
    return any(isinstance(item, dict | list) for item in layer)


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables are merged; any other value of `high` replaces that of `low`."""
    result = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


class Word(str):
    """A value on the command line: the text itself for a key that holds text, for any other what it is in TOML."""


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--a.b 1 --c=x --flag` -> {"a": {"b": Word("1")}, "c": Word("x"), "flag": True}."""
    result: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word}: expected --section.key value")
        key, equals, value = word[2:].partition("=")
        nested: Any = Word(value)
        if not equals:
            nested = Word(rest.pop(0)) if rest and not rest[0].startswith("--") else True
        for part in reversed(key.replace("-", "_").split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def _parse_value(text: str) -> Any:
    if text in ("True", "False"):  # as --help shows them
        return text == "True"
    try:
        return _parse_toml(f"value = {text}")["value"]
    except ValueError:
        return str(text)


def build(cls: type[Config], values: Mapping[str, Any], origin: str) -> Config:
    """A (nested) dataclass from plain values. Raises UserError for an unknown key or a value of the wrong type;
    `origin` says in the message where the values come from."""
    return _construct(cls, _checked(cls, values, origin, ""))


def _construct(cls: type[Config], values: Mapping[str, Any]) -> Config:
    hints = typing.get_type_hints(cls)
    nested = {key for key in values if dataclasses.is_dataclass(hints[key])}
    return cls(**{key: _construct(hints[key], value) if key in nested else value for key, value in values.items()})


def _checked(cls: type, values: Mapping[str, Any], origin: str, prefix: str) -> dict[str, Any]:
    """The values as the fields of `cls` want them, sections still as dicts."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    unknown = [key for key in values if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1, cutoff=0.5)
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(fields)}"
        raise UserError(f"{origin}: unknown key {prefix}{unknown[0]}; {hint}")
    return {key: _convert(hints[key], value, origin, prefix + key) for key, value in values.items()}


def _convert(hint: Any, value: Any, origin: str, key: str) -> Any:
    kind = typing.get_origin(hint)
    if kind in (types.UnionType, typing.Union):
        absent = value is None or (isinstance(value, Word) and value == "None")
        return None if absent else _convert(next(iter(typing.get_args(hint))), value, origin, key)
    choices = typing.get_args(hint) if kind is Literal else ()
    if isinstance(value, Word):
        is_text = hint is str or value in choices or (kind is tuple and not value.startswith("["))
        value = str(value) if is_text else _parse_value(value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{origin}: {key} is a section; set one of its keys, as in --{key}.NAME value")
        return _checked(hint, value, origin, key + ".")
    if kind is tuple and isinstance(value, (str, list, tuple)):
        value = [value] if isinstance(value, str) else value
        return tuple(_convert(typing.get_args(hint)[0], item, origin, key) for item in value)
    if isinstance(value, str) and not _is_plain(value):
        raise UserError(
            f"{origin}: {key} is {json.dumps(value)}, but must be text without NUL, DEL and half surrogates"
        )
    if not _is_sane(value):
        raise UserError(f"{origin}: {key} is {value}, but must be finite, and a whole number of at most 64 bits")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if type(value) is hint or value in choices:
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    expected = f"one of {', '.join(map(str, choices))}" if choices else names.get(hint, "a list")
    raise UserError(f"{origin}: {key} is {json.dumps(value, default=str)}, but must be {expected}")


def _is_plain(text: str) -> bool:
    """Whether it can stand in TOML as JSON writes it, and in the name of a file."""
    return not re.search("[\0\x7f\ud800-\udfff]", text)


def _is_sane(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < 2**63


def load(cls: type[Config], path: str | AnyPath, overrides: Sequence[str] = ()) -> Config:
    """Defaults < base < file < overrides. Each source is checked by itself, so that an error names the right one."""
    from_line = _checked(cls, parse_overrides(overrides), "command line", "")
    from_file = _checked(cls, read_toml(path), str(path), "")
    return _construct(cls, merge(from_file, from_line))


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
