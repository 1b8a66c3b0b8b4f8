"""What the reports of all tasks share: the console, the first lines, training with its progress, the results file."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from electrax.config import UserError
from electrax.experiment.plan import Plan
from electrax.experiment.run import RESULTS_FILE, Run, side_by_side, train_side_by_side
from electrax.models.flops import peak_flops
from electrax.storage import is_remote, locked, make_folder, path_of, write_atomically
from electrax.training.collectives import Collective
from electrax.training.loop import Interrupted, Record
from electrax.training.optim import learning_rate
from electrax.training.processes import agreed, is_first, together
from electrax.training.profile import Profile, ProfiledStep
from electrax.training.tracking import NoTracker, Tracker
from electrax.training.watchdog import Watchdog
from electrax.training.window import NonFiniteLoss

console = Console()
INTERRUPTED = 130  # exit status


class NamedConsole(Console):
    """Plain lines that begin with a run's name: one terminal has no room for the bars of several."""

    def __init__(self, name: str):
        super().__init__(force_terminal=False)
        self._name = name

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(self._name, *objects, **options)


def show_line(name: str, value: str) -> None:
    console.print(f"[bold]{name:<14}[/] {escape(value)}", highlight=False, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """The first column is text, the others stand at the right; figures have four digits."""
    table = Table()
    for place, name in enumerate(columns):
        table.add_column(escape(str(name)), justify="right" if place else "left")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else escape(str(value)) for value in row))
    console.print(f"[bold]{escape(title)}[/]")
    console.print(table)


def show_machine(run: Run) -> None:
    """The devices, and the parameters of each part."""
    devices, sizes = jax.devices(), {name: _count(tree) for name, tree in run.state.params.items()}
    shape = "x".join(str(n) for n in run.mesh.devices.shape)
    show_line(
        "devices",
        f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), mesh data x fsdp x model {shape}",
    )
    parts = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    show_line("parameters", f"{parts}, together {sum(sizes.values()):,}")


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def show_steps(run: Run, tokens: str) -> None:
    """The steps to go, and what one costs."""
    flops = f"{run.flops_per_step:.3g} in matrix products ({run.flops_per_step * run.steps:.3g} the run)"
    show_line("steps", f"{run.start:,} to {run.steps:,}" + (" (continued)" if run.start else ""))
    show_line("tokens a step", tokens)
    show_line("FLOPs a step", flops)


def show_plan(plan: Plan) -> None:
    """Bytes of a device, and what a step exchanges."""
    shape = "x".join(map(str, plan.mesh))
    show_line("devices", f"{math.prod(plan.mesh)} x {plan.devices}, mesh data x fsdp x model {shape}")
    show_line("micro-batch", f"{plan.microbatch} rows")
    parts = {name: getattr(plan, name) for name in ("parameters", "optimizer", "batch", "activations")}
    parts["together"] = sum(parts.values())
    show_table("a device holds", ("", "MB"), ((name, f"{size / 1e6:,.2f}") for name, size in parts.items()))
    if not plan.collectives:
        console.print("a step exchanges nothing")
        return
    kinds: dict[tuple[str, int], list[Collective]] = {}
    for collective in plan.collectives:
        kinds.setdefault((collective.kind, collective.group), []).append(collective)
    rows = (
        (f"{kind} of {group}", sum(c.times for c in found), *(f"{n / 1e6:,.3f}" for n in _exchanged(found)))
        for (kind, group), found in sorted(kinds.items())
    )
    show_table("a step exchanges", ("", "times", "MB", "MB a device sends"), rows)


def _exchanged(found: Sequence[Collective]) -> tuple[float, float]:
    """Bytes of the arrays, and bytes that a device sends."""
    return float(sum(c.times * c.size for c in found)), float(sum(c.sent for c in found))


@dataclasses.dataclass
class StopSignal:
    """True once SIGTERM or Ctrl-C has come; a second one ends the process at once.

    Of several processes it becomes true at the same call in all of them, whichever got the signal: JAX's runtime
    watches for SIGTERM (the notice of a preemption, too) and agrees on the call.
    """

    asked: bool = False
    calls: int = 0

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.print("stopping after this step and saving; once more ends at once, without saving")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which the runtime tells the others

    def __call__(self) -> bool:
        self.calls += 1
        return self.asked if jax.process_count() == 1 else reached_preemption_sync_point(self.calls)


@contextlib.contextmanager
def alone(workdir: str | os.PathLike) -> Iterator[None]:
    """Makes the work directory, and lets no other run into it as long as this one is at work. A directory that nothing
    came into, because the input is wrong, goes again."""
    workdir, made = path_of(workdir), []
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            if not is_remote(workdir):
                made.extend(path for path in (workdir, *workdir.parents) if not path.exists())
            make_folder(workdir)
            stack.enter_context(locked(workdir, "run"))

        try:
            agreed(enter)
            with together():
                if not is_remote(workdir) and not workdir.is_dir():
                    raise UserError(f"{workdir}: not there; expected storage that all processes of a run share")
            yield
        finally:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def train_and_track(run: Run, command: str) -> Record | None:
    """Trains to the end and returns the last evaluation; None after a stop that saved. `command` continues the run."""
    profiled = ProfiledStep(run.step_function, path_of(run.config.workdir) / "profile")
    tracker = _track(run, console)
    final: Record | None = None
    try:
        with StopSignal() as stop, _watchdog(run) as watchdog:
            console.print("compiling the step …")
            needed = run.memory()
            show_line("memory a step", f"{needed / 1e6:,.0f} MB a device, micro-batches of {run.microbatch} rows")
            [watched] = _watched({"": run}, watchdog).values()
            for record in watched.train(watchdog.before(stop), step=profiled if run.config.profile else None):
                tracker.write(record)
                final = record if record.kind == "eval" else final
        run.checkpoints.wait()
    except Interrupted as stopped:
        run.checkpoints.wait()
        console.print(f"saved step {stopped.step} in {run.config.workdir}; to continue: {command}", soft_wrap=True)
        return None
    finally:
        tracker.close()
        run.checkpoints.close()
    assert final is not None  # the loop always evaluates the last step
    if run.config.profile:
        show_profile(profiled.finish())
    return final


def show_profile(profile: Profile | None) -> None:
    if profile is None:
        console.print("profile: too few steps to trace any")
        return
    milliseconds = profile.seconds / profile.steps * 1e3
    rows = [(name, f"{share:.1%}") for name, share in profile.parts.items()]
    show_table(f"{profile.steps} steps traced, {milliseconds:,.1f} ms each", ("part", "share of the time"), rows)


def _watchdog(run: Run) -> Watchdog:
    return Watchdog(run.config.log.stall, logging.getLogger("electrax").warning)


def _watched(runs: Mapping[str, Run], watchdog: Watchdog) -> dict[str, Run]:
    """The runs, whose evaluations, however long, are no stall."""
    return {name: dataclasses.replace(run, evaluate=watchdog.unwatched(run.evaluate)) for name, run in runs.items()}


def train_and_track_side_by_side(runs: Mapping[str, Run], command: str) -> dict[str, Record | NonFiniteLoss] | None:
    """The same for several runs in one program: the last evaluation of each, or why it did not train."""
    console.print("compiling the step …")
    step, needed = side_by_side(runs)
    rows = next(iter(runs.values())).microbatch
    show_line("memory a step", f"{needed / 1e6:,.0f} MB a device, {len(runs)} models with micro-batches of {rows} rows")
    ends: dict[str, Record | NonFiniteLoss] = {}
    stopped: dict[str, Interrupted] = {}
    with contextlib.ExitStack() as stack:
        trackers = {name: _track(run, NamedConsole(name)) for name, run in runs.items()}
        for name, run in runs.items():
            stack.callback(run.checkpoints.close)
            stack.callback(trackers[name].close)
        stop, watchdog = stack.enter_context(StopSignal()), stack.enter_context(_watchdog(next(iter(runs.values()))))
        for name, event in train_side_by_side(_watched(runs, watchdog), step, watchdog.before(stop)):
            match event:
                case Interrupted():
                    stopped[name] = event
                case NonFiniteLoss():
                    ends[name] = event
                    console.print(f"{name} [bold red]did not train[/]; the others go on")
                case Record():
                    trackers[name].write(event)
                    if event.kind == "eval":
                        ends[name] = event
        for run in runs.values():
            run.checkpoints.wait()
    for name, ending in stopped.items():
        console.print(f"saved step {ending.step} in {runs[name].config.workdir}", soft_wrap=True)
    if stopped:
        console.print(f"to continue: {command}", soft_wrap=True)
        return None
    return ends


def _track(run: Run, console: Console) -> Tracker | NoTracker:
    workdir = path_of(run.config.workdir)
    if run.start < run.steps:
        agreed(lambda: (workdir / RESULTS_FILE).unlink(missing_ok=True))  # those of a shorter run
    if not is_first():
        return NoTracker()
    return Tracker(workdir, run.start, run.steps, _rates(run), console)


def _rates(run: Run):
    peak = peak_flops(jax.devices()[0], run.config.model.compute_dtype) * len(jax.devices())

    def rates(step: int, seconds: float, steps: int) -> dict[str, float]:
        return {
            "learning_rate": float(learning_rate(run.config.optimizer, run.steps, step - 1)),
            "tokens_per_second": steps * run.tokens_per_step / seconds,
            "mfu": steps * run.flops_per_step / seconds / peak,
        }

    return rates


def write_results(workdir: str | os.PathLike, results: dict[str, Any]) -> None:
    """results.json, last and atomically: its presence says that the run is done. What is not finite is null."""
    agreed(write_atomically, path_of(workdir) / RESULTS_FILE, json.dumps(_finite(results), indent=1) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
