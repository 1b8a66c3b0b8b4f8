"""Where the time of a step goes: a trace of a few steps, and what its operations belong to."""

import gzip
import json
import pathlib
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from electrax.config import AnyPath
from electrax.tasks.base import Batch
from electrax.training.state import Step, StepResult, TrainState

WARM_UP, TRACED = 2, 5  # steps
# a part of the path by which JAX names an operation, the first that fits -> what it belongs to
PARTS = (
    (r"(^|/)optimizer(/|$)", "optimizer"),
    (r"(^|/|\()prepare(/|\)|$)", "masking"),
    (r"Generator\)*/head/|(^|/|\()(vocabulary|sampling)(/|\)|$)", "vocabulary"),
    (r"Embeddings|embeddings_project", "embeddings"),
    (r"/attention/(?!(qkv|output)/)", "attention"),
    (r"(dot_general|transpose)$", "matrix products"),
    (r"/(layer_\d+|Block_\d+|encoder|head)/", "norms, activations, dropout"),
)
OTHER = "other"


class Profile(NamedTuple):
    steps: int
    seconds: float  # of all of them
    busy: float  # the share of that time in which a device was at work
    parts: dict[str, float]  # the share of the devices' time, largest first


class ProfiledStep:
    """A step of which a few calls are traced, after those that warm up; the trace is kept in `directory`."""

    def __init__(self, step: Step, directory: AnyPath):
        self._step, self._directory = step, directory
        self._calls, self._traced, self._began, self._seconds = 0, 0, 0.0, 0.0
        self._programs: list[jax.stages.Compiled] = []
        self._open = False

    def __call__(self, state: TrainState, batch: Batch) -> StepResult:
        if self._calls == WARM_UP:
            self._start(state)
        if self._open and (program := self._step.compiled(state, batch)) not in self._programs:
            self._programs.append(program)
        result = self._step(state, batch)
        self._calls += 1
        if self._open:
            self._traced += 1
            if self._traced == TRACED:
                self._stop(result)
        return result

    def _start(self, state: TrainState) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.block_until_ready(state)
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._open, self._began = True, time.perf_counter()

    def _stop(self, result: Any = ()) -> None:
        jax.block_until_ready(result)
        self._seconds, self._open = time.perf_counter() - self._began, False
        jax.profiler.stop_trace()

    def finish(self) -> Profile | None:
        """What the trace says; None where there were too few steps for one."""
        if self._open:
            self._stop()
        if not self._traced:
            return None
        events = read_events(self._directory)
        names: dict[str, str] = {}
        for program in self._programs:
            names |= operation_names(program.as_text())
        parts = Counter[str]()
        for name, microseconds in own_time(events).items():
            parts[part_of(names.get(name, ""))] += microseconds
        total = sum(parts.values()) or 1.0
        shares = {name: value / total for name, value in parts.most_common()}
        return Profile(self._traced, self._seconds, busy_time(events) / 1e6 / self._seconds, shares)


def part_of(path: str) -> str:
    return next((part for pattern, part in PARTS if re.search(pattern, path)), OTHER)


def operation_names(program: str) -> dict[str, str]:
    """The operations of a compiled program by what JAX called each, such as jit(step)/…/attention/dot_general."""
    lines = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{op_name="([^"]*)"', program, re.MULTILINE)
    return dict(lines)


def read_events(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The operations of the newest trace in a directory, each with its thread, start and duration in microseconds."""
    file = max(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(file, "rt", encoding="utf-8") as text:
        events = json.load(text)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and "hlo_op" in (event.get("args") or {})]


def own_time(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Microseconds of each operation without those of the operations inside it, over all threads."""
    threads = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["args"]["hlo_op"]))
    total = Counter[str]()
    for found in threads.values():
        around: list[tuple[float, str]] = []  # where each operation that is under way ends
        for start, minus_duration, name in sorted(found):
            while around and around[-1][0] <= start:
                around.pop()
            if around:
                total[around[-1][1]] += minus_duration
            total[name] -= minus_duration
            around.append((start - minus_duration, name))
    return dict(total)


def busy_time(events: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one operation ran."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy
