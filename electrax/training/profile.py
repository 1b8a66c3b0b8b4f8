"""Where the time of a step goes: a trace of a few steps, and what its operations belong to."""

import gzip
import json
import pathlib
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
    (r"(^|/|\()(vocabulary|sampling)(/|\)|$)", "vocabulary"),
    (r"Embeddings|embeddings_project", "embeddings"),
    (r"/(cross_)?attention/(?!(cross_attention\.project/)?(qkv|query|key_value|output)/)", "attention"),
    (r"(dot_general|transpose)$", "matrix products"),
    (r"[/(](layer_\d+|Block_\d+|[Ee]ncoder|\w*[Hh]ead(\.transform)?)[/)]", "norms, activations, dropout"),
)
OTHER, HOST = "other", "host, devices waiting"


class Profile(NamedTuple):
    steps: int
    seconds: float  # of all of them
    parts: dict[str, float]  # their shares of that time, largest first


class Program(NamedTuple):
    module: str  # its name, which the programs of one function share
    operations: dict[str, str]  # by what JAX called each, such as jit(step)/…/attention/dot_general


class Run(NamedTuple):
    """What an operation of a trace ran in: on a CPU one call of a program, on a GPU all calls of one."""

    module: str
    number: str


class ProfiledStep:
    """A step of which a few calls are traced, after those that warm up; the trace is kept in `directory`."""

    def __init__(self, step: Step, directory: AnyPath):
        self._step, self._directory = step, directory
        self._calls, self._began, self._seconds = 0, 0.0, 0.0
        self._programs: dict[tuple, jax.stages.Compiled] = {}  # by the shapes of their batches
        self._traced: list[tuple] = []  # the shapes of each call
        self._open = False

    def __call__(self, state: TrainState, batch: Batch) -> StepResult:
        if self._calls >= WARM_UP and len(self._traced) < TRACED:
            self._traced.append(self._compiled(state, batch))
        if self._calls == WARM_UP:
            self._start(state)
        result = self._step(state, batch)
        self._calls += 1
        if self._open and len(self._traced) == TRACED:
            self._stop(result)
        return result

    def _compiled(self, state: TrainState, batch: Batch) -> tuple:
        """The shapes of a batch whose program is there; the time of making it does not count."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            jax.block_until_ready(state)
            began = time.perf_counter()
            self._programs[shapes] = self._step.compiled(state, batch)
            self._began += time.perf_counter() - began
        return shapes

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
        programs = {shapes: read_program(program.as_text()) for shapes, program in self._programs.items()}
        names = operation_names(events, [programs[shapes] for shapes in self._traced])
        parts = Counter[str]()
        for (run, name), microseconds in own_time(events).items():
            parts[part_of(names.get(run, {}).get(name, ""))] += microseconds
        # several devices or threads work at once: their parts share the time in which any did
        total, busy = sum(parts.values()) or 1.0, min(1.0, busy_time(events) / 1e6 / self._seconds)
        shares = Counter({name: busy * value / total for name, value in parts.items()} | {HOST: 1.0 - busy})
        return Profile(len(self._traced), self._seconds, dict(shares.most_common()))


def part_of(path: str) -> str:
    return next((part for pattern, part in PARTS if re.search(pattern, path)), OTHER)


def read_program(text: str) -> Program:
    module = re.match(r"HloModule ([\w.\-]+)", text)
    lines = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{op_name="([^"]*)"', text, re.MULTILINE)
    return Program(module[1] if module else "", dict(lines))


def operation_names(events: Iterable[Mapping[str, Any]], called: Sequence[Program]) -> dict[Run, dict[str, str]]:
    """What JAX called the operations of each run of the programs that were `called`, in that order. The events do not
    say which program a run is of, but runs begin in the order of the calls."""
    modules = {program.module for program in called}
    in_order = (run_of(event) for event in sorted(events, key=lambda event: event["ts"]))
    runs = list(dict.fromkeys(run for run in in_order if run.module in modules))
    if len(runs) != len(called):
        called = list({id(program): program for program in called}.values())
    return {run: program.operations for run, program in zip(runs, called, strict=False)}


def run_of(event: Mapping[str, Any]) -> Run:
    found = event["args"]
    return Run(found.get("hlo_module", ""), found.get("run_id") or found.get("program_id", ""))


def read_events(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The operations of the newest trace in a directory, each with its thread, start and duration in microseconds."""
    file = max(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(file, "rt", encoding="utf-8") as text:
        events = json.load(text)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and "hlo_op" in (event.get("args") or {})]


def own_time(events: Iterable[Mapping[str, Any]]) -> dict[tuple[Run, str], float]:
    """Microseconds of each operation without those of the operations inside it, over all threads."""
    threads = defaultdict(list)
    for event in events:
        name = run_of(event), event["args"]["hlo_op"]
        threads[event["pid"], event["tid"]].append((event["ts"], -event["dur"], name))
    total = Counter[tuple[Run, str]]()
    for found in threads.values():
        around: list[tuple[float, tuple[Run, str]]] = []  # where each operation that is under way ends
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
