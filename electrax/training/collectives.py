"""What devices exchange in a compiled step, read from its program."""

import collections
import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\((.*)")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    kind: str  # one of KINDS
    size: int  # bytes of one device's whole arrays: those summed, those gathered, those before they are scattered
    group: int  # devices that exchange with each other
    times: int  # a step
    name: str  # of the operation it was compiled from

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, over a ring: each array (n - 1) / n times, for a sum twice."""
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * passes * self.size * (self.group - 1) / self.group


def collectives(program: str) -> list[Collective]:
    """Those of a compiled program (`Compiled.as_text()`) among more than one device; what lies in a loop counts as
    often as the loop runs, where the compiler knows that."""
    lines: dict[str, list[str]] = {}
    entry = current = ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            current = found.group(1)
            lines[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            lines[current].append(line)
    times: collections.Counter[str] = collections.Counter({entry: 1})
    waiting = [entry]
    while waiting:  # a computation is called from one place, as the compiler copies them
        name = waiting.pop()
        for line in lines.get(name, ()):
            body = _WHILE.search(line)
            trips = int(found.group(1)) if body and (found := _TRIPS.search(line)) else 1
            for called in re.findall(r"[\w.\-]+", " ".join(one or several for one, several in _CALLED.findall(line))):
                if called in lines and called not in times:
                    times[called] = times[name] * (trips if body and called == body.group(1) else 1)
                    waiting.append(called)
    made = []
    for name, count in times.items():
        for line in lines.get(name, ()):
            found = _COLLECTIVE.search(line)
            if not found:
                continue
            shapes, kind, rest = found.groups()
            group = _group(rest)
            size = sum(map(_size, re.findall(r"(\w+)\[([\d,]*)\]", shapes)))
            if kind == "reduce-scatter":
                size *= group
            if group > 1:
                what = re.search(r'op_name="([^"]*)"', rest)
                made.append(Collective(kind, size, group, count, what.group(1) if what else ""))
    return made


def _size(shape: tuple[str, str]) -> int:
    dtype, dimensions = shape
    return BYTES.get(dtype, 4) * math.prod(int(size) for size in dimensions.split(",") if size)


def _group(attributes: str) -> int:
    """Devices in one of the groups `{{0,1},{2,3}}`, `[groups,devices]<=[…]` or `mesh['a'=2,'b'=4] {'b','a':(1)2}`."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found.group(1))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2 if "source_target_pairs" in attributes else 1
