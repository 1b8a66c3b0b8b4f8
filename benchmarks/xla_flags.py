"""Compiler flags of XLA, each against none: the pretraining step of ELECTRA-Small in fresh processes.

    python -m benchmarks.xla_flags [--rounds 3] [--calls 5] [--batch 16] [--flags=--xla_… [--flags=…]]

A flag is read when JAX starts, so every measurement is a process of its own; the processes of one flag and of none take
turns. Ratios are flag / none of the same round (below 1 is faster): of a step's time, and of the first call's, which
compiles. On a GPU, where a process takes about two minutes, in bfloat16, with other flags and more rows.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import jax

from benchmarks.report import environment, spread, write
from electrax.xla_flags import FLAGS

CPU_CANDIDATES = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_enable_fast_math=true",
    "--xla_cpu_use_xnnpack=true",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_cpu_copy_insertion_use_region_analysis=true",
    "--xla_cpu_parallel_codegen_split_count=2",
    "--xla_backend_optimization_level=1",
)
GPU_CANDIDATES = (
    *FLAGS,
    "--xla_gpu_enable_command_buffer=",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_triton_gemm_any=true",
    "--xla_gpu_enable_cublaslt=true",
    "--xla_gpu_cudnn_gemm_fusion_level=2",
    "--xla_gpu_exhaustive_tiling_search=true",
    "--xla_gpu_enable_while_loop_double_buffering=true",
)


def measure_here(batch: int, calls: int) -> dict:
    """Of this process: seconds of the first call, and of a step in those after it."""
    from benchmarks.pretrain_step import Training, step_config

    words = [] if jax.default_backend() == "cpu" else ["--model.compute_dtype=bfloat16"]
    training = Training(step_config("small", batch, 128, *words))
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        float(training.start())
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "step": sorted(seconds[1:])[calls // 2] / training.steps_a_call}


def measure(flags: str, options: argparse.Namespace) -> dict:
    """Of a fresh process with these flags and no compilation cache."""
    command = [sys.executable, "-m", "benchmarks.xla_flags", "--here", f"--batch={options.batch}"]
    found = subprocess.run(
        [*command, f"--calls={options.calls}"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


def is_known(flag: str) -> bool:
    """Whether this build of XLA has it: given another, it ends the process."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == 0


def platform() -> str:
    """JAX's, asked for by a process of its own: one that has a GPU takes its memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5, help="of one step on a CPU, of several on a GPU")
    parser.add_argument("--batch", type=int, default=0, help="rows; 0: 16 on a CPU, 128 on a GPU")
    parser.add_argument("--flags", action="append", help="one, instead of those for the platform; may be repeated")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.batch, options.calls)))
        return
    on_cpu = platform() == "cpu"
    options.batch = options.batch or (16 if on_cpu else 128)
    options.flags = options.flags or (CPU_CANDIDATES if on_cpu else GPU_CANDIDATES)
    known = [flag for flag in options.flags if is_known(flag)]
    for flag in options.flags:
        if flag not in known:
            print(f"{flag:62} unknown to this build of XLA")
    rounds: dict[str, list[dict]] = {flag: [] for flag in ("", *known)}
    for _ in range(options.rounds):
        for flag, found in rounds.items():
            found.append(measure(flag, options))
    rows = []
    for flag in known:
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
