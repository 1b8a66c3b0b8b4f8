"""Compiler flags of XLA, each against none: the pretraining step of ELECTRA-Small in fresh processes.

    python -m benchmarks.xla_flags [--rounds 3] [--steps 5] [--batch 16] [--flags=--xla_… …]

A flag is read when JAX starts, so every measurement is a process of its own; the processes of one flag and of none take
turns. Ratios are flag / none of the same round (below 1 is faster): of a step's time, and of the first step's, which
compiles.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from benchmarks.report import environment, spread, write
from electrax.xla_flags import FLAGS

CANDIDATES = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_enable_fast_math=true",
    "--xla_cpu_use_xnnpack=true",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_cpu_copy_insertion_use_region_analysis=true",
    "--xla_cpu_parallel_codegen_split_count=2",
    "--xla_cpu_use_multi_output_fusion=true",
    "--xla_backend_optimization_level=1",
)


def measure_here(batch: int, steps: int) -> dict:
    """Of this process: seconds of the first step and of each after it."""
    from benchmarks.pretrain_step import electrax_step

    run, _ = electrax_step("small", batch, 128, 0)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "step": sorted(seconds[1:])[steps // 2]}


def measure(flags: str, options: argparse.Namespace) -> dict:
    """Of a fresh process with these flags and no compilation cache."""
    command = [sys.executable, "-m", "benchmarks.xla_flags", "--here", f"--batch={options.batch}"]
    found = subprocess.run(
        [*command, f"--steps={options.steps}"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--flags", nargs="+", default=CANDIDATES)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.batch, options.steps)))
        return
    rounds: dict[str, list[dict]] = {flag: [] for flag in ("", *options.flags)}
    for _ in range(options.rounds):
        for flag, found in rounds.items():
            found.append(measure(flag, options))
    rows = []
    for flag in options.flags:
        ratios = {
            what: spread([a[what] / b[what] for a, b in zip(rounds[flag], rounds[""], strict=True)])
            for what in ("step", "first")
        }
        rows.append({"flag": flag, "in_profile": flag in FLAGS, **ratios})
        step, first = ratios["step"], ratios["first"]
        print(
            f"{flag:62} step {step['median']:.3f} [{step['min']:.3f}, {step['max']:.3f}]  "
            f"first {first['median']:.3f} [{first['min']:.3f}, {first['max']:.3f}]",
            flush=True,
        )
    none = {what: spread([each[what] for each in rounds[""]]) for what in ("step", "first")}
    write("xla_flags.json", environment() | {"batch": options.batch, "seconds_without": none, "flags": rows})


if __name__ == "__main__":
    main()
