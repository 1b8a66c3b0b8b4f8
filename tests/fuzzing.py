"""What the fuzz tests share: damage to bytes and to JSON, and what a reader may do about it."""

import copy
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

from electrax.config import LONGEST_MESSAGE, UserError

# the same examples every time; more of them, other ones too, where ELECTRAX_FUZZ says how many
settings = hypothesis.settings(
    max_examples=int(os.environ.get("ELECTRAX_FUZZ", 40)),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
# what has a meaning in one format or another, or none in UTF-8
PIECES = (
    *(b"\0", b"\r", b"\n", b'"', b"'", b'"\n', b"\t", b",", b";", b" ", b"=", b".", b"[", b"]", b"{", b"}", b"#", b"-"),
    *(b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\ud800", b"\\u0000", b"NaN", b"-1", b"1e400"),
    *(b"null", b"true", b"inf", b"1" * 5000, b"[" * 100, b"[" * 2000, b'{"a":' * 200, b"a." * 300, b"x" * 3000),
    *(b"-DOCSTART-\n", b"1-2\t"),
)
VALUES = (
    *(None, True, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, float("inf"), float("nan")),
    *("", " ", "a", "1", "\0", "\ud800", "\n", "../a", "/etc/passwd", "object"),
    *([], [[]], {}, {"": {}}, {"text": []}, [None, "a"], ["a", "a"]),
    *(json.loads("[" * depth + "]" * depth) for depth in (60, 400)),
)


@st.composite
def damaged(draw: Callable, valid: bytes) -> bytes:
    """Bytes with up to four places cut off, left out, repeated, or with something put in."""
    data = valid
    for _ in range(draw(st.integers(1, 4))):
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=8))
        whole = data[:at] + piece + data[at:]
        data = draw(
            st.sampled_from((whole, data[:at] + piece + data[end:], data[:end] + data[at:], data[:at], data[at:]))
        )
    return data


@st.composite
def changed(draw: Callable, valid: Any) -> Any:
    """A JSON value in which up to three others are replaced, left out or doubled, whatever they were."""
    value = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(_places(value))))
        match draw(st.sampled_from(("replace", "replace", "drop", "add"))):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "drop" if holder is not value:
                del holder[key]
            case "add" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(("a", "", "text", "\n")))] = holder[key]
    return value[0] if value else None


def _places(holder: Any, depth: int = 0):
    """(holder, key) of every value."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list) and depth < 20:
            yield from _places(holder[key], depth + 1)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines_of(values: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON lines, one of them changed."""
    lines = [as_json(value) for value in values]
    some = st.sampled_from(range(len(values))).flatmap(lambda i: st.tuples(st.just(i), changed(values[i])))
    return some.map(lambda it: b"\n".join([*lines[: it[0]], as_json(it[1]), *lines[it[0] + 1 :]]) + b"\n")


def read_or_refuse(read: Callable[[], Any], path: pathlib.Path | None) -> Any:
    """What a reader gives; None where it refuses the file in one line that names it. All else is a failure."""
    try:
        return read()
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) <= LONGEST_MESSAGE + 1, message
        assert path is None or path.name in message, message
