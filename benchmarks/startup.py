"""How long `electrax pretrain` takes from its start to its first step, in fresh processes, and what takes that long.

    python -m benchmarks.startup [--config small] [--batch 16] [--rounds 3] [--kinds cold cached resumed] [--layers …]

The command trains on the bundled sample, prepared before; 16 rows a step, since the time of a CPU's step is not what is
measured here. cold: nothing is compiled yet. cached: the persistent compilation cache has every program. resumed: that,
and a checkpoint to continue from. Layers unrolled (the default) and scanned. Importing is measured against that of JAX
and Flax alone. Seconds are those of JAX's own log (JAX_LOG_COMPILES), and of the lines as they arrive: that of step 1
comes when step 2 has been started, which on a CPU means done.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report import environment, shown, spread, write

IMPORTS = {
    "jax, flax": "import jax, flax",
    "electrax": "import electrax",
    "electrax.load": "import electrax; electrax.load",
    "all of pretrain": "import electrax.report.pretrain",
}
KINDS = ("cold", "cached", "resumed")
LAYERS = {"unrolled": "false", "scanned": "true"}
TARGET = 10.0  # seconds from the start of the process to its first step, through the cache
# how JAX logs what a program took, and what we call it
STAGES = {
    r"Finished tracing (.+?) for jit in ([\d.e-]+) sec": "trace",
    r"Finished jaxpr to MLIR module conversion jit\((.+?)\) in ([\d.e-]+) sec": "lower",
    r"Finished XLA compilation of jit\((.+?)\) in ([\d.e-]+) sec": "compile",
}
PROGRAMS = {"build": "first state", "step": "step"}  # the two large ones


def variables() -> dict[str, str]:
    """The environment of a measured process, which finds and leaves byte code as an installed one does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONUNBUFFERED": "1"}


def import_seconds(statement: str) -> float:
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", code], env=variables(), stdout=subprocess.PIPE, check=True, text=True)
    return float(run.stdout)


def command(options: argparse.Namespace, workdir: Path, layers: str) -> list[str]:
    words = ["--data.path", "sample", "--workdir", str(workdir), "--batch_size", str(options.batch)]
    words += ["--log.every", "1", "--model.scan_layers", LAYERS[layers], *options.words]
    return [sys.executable, "-m", "electrax", "pretrain", options.config, *words]


def start(words: list[str], cache: Path, save: bool = False) -> dict[str, Any]:
    """Runs the command until its first step is logged; what JAX says of each program, and when which line came. Then
    it is killed, or with `save` stopped so that it saves."""
    logged = {"JAX_LOG_COMPILES": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    seconds, programs, lines, began = Counter[str](), 0, [], time.perf_counter()
    marks: dict[str, float] = {}
    process = subprocess.Popen(
        words, env=variables() | logged, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        now = time.perf_counter() - began
        lines.append(line)
        for pattern, stage in STAGES.items():
            if found := re.search(pattern, line):
                seconds[f"{stage}, {PROGRAMS.get(found[1], 'small programs')}"] += float(found[2])
                programs += stage == "compile"
        for mark, beginning in {"set up": "devices", "step compiled": "memory a step"}.items():
            if line.startswith(beginning):
                marks.setdefault(mark, now)
        if re.match(r"step \d+/", line):
            marks["first step"] = now
            break
    process.send_signal(signal.SIGTERM if save else signal.SIGKILL)
    process.communicate()
    if "first step" not in marks:
        raise SystemExit(f"no step of {' '.join(words)}\n{''.join(lines[-20:])}")
    return {"marks": marks, "stages": dict(seconds), "programs": programs}


def measure(options: argparse.Namespace, layers: str, data: Path, directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The starts of each kind; the first cold one fills the cache that the others take."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in options.kinds}
    cache = directory / f"cache-{layers}"

    def fresh(name: str) -> Path:
        workdir = directory / f"{layers}-{name}"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(data, workdir / "data")
        return workdir

    if "cold" not in options.kinds:
        start(command(options, fresh("fill"), layers), cache)
    saved = fresh("saved")
    for number in range(options.rounds):
        for kind in options.kinds:
            if kind == "cold" and number < options.cold_rounds:
                used = cache if number == 0 else directory / f"empty-{layers}-{number}"
                found[kind].append(start(command(options, fresh("cold"), layers), used))
            elif kind == "cached":
                found[kind].append(start(command(options, fresh("cached"), layers), cache))
            elif kind == "resumed":
                if not (saved / "checkpoints").is_dir():
                    start(command(options, saved, layers), cache, save=True)
                found[kind].append(start(command(options, saved, layers), cache))
    return found


def summarize(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each mark and stage the spread over the starts."""
    result: dict[str, Any] = {"programs": starts[0]["programs"]}
    for group in ("marks", "stages"):
        names = dict.fromkeys(name for each in starts for name in each[group])
        result[group] = {name: spread([each[group].get(name, 0.0) for each in starts]) for name in names}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold_rounds", type=int, default=2, help="at most; compiling takes long")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("words", nargs="*", help="after --, as `electrax pretrain` takes them")
    options = parser.parse_args()
    results: dict[str, Any] = {"target_seconds_to_first_step_cached": TARGET, "starts": {}}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        import_seconds(IMPORTS["all of pretrain"])  # leaves byte code
        seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
        for _ in range(options.rounds):
            for name, statement in IMPORTS.items():
                seconds[name].append(import_seconds(statement))
        results["imports"] = {name: spread(values) for name, values in seconds.items()}
        for name, values in results["imports"].items():
            print(f"import {name:20}{shown(values)} s", flush=True)
        start(command(options, directory / "prepare", options.layers[0]), directory / "cache-prepare")
        for layers in options.layers:
            for kind, starts in measure(options, layers, directory / "prepare" / "data", directory).items():
                results["starts"][f"{layers}, {kind}"] = row = summarize(starts)
                print(f"{layers}, {kind}: " + ", ".join(f"{k} at {shown(v)} s" for k, v in row["marks"].items()))
                largest = sorted(row["stages"].items(), key=lambda item: -item[1]["median"])
                print("    " + ", ".join(f"{k} {v['median']:.1f}" for k, v in largest[:7]), flush=True)
            # what is there is kept, should a later start fail
            write("startup.json", environment() | results)


if __name__ == "__main__":
    main()
