"""Resident memory of a training step in electrax and in PyTorch with Transformers, each in a process of its own.

    python -m benchmarks.memory [--size small] [--batch 16 32] [--length 128] [--rounds 3]

Pretraining (the steps of `benchmarks.pretrain_step`) and classification fine-tuning (`benchmarks.finetune_step`). Of
each process, in MB (Linux): `before`, what is resident once everything is imported; `steps`, the greatest during three
steps after the first, `steps_added` without `before`; `whole`, the greatest of all, first step and compilation
included. electrax compiles anew ("compiling") or takes its programs from a cache ("electrax"). The process of the
PyTorch side imports JAX too, for shapes and data: what that alone takes is left out of its figures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import finetune_step, pretrain_step
from benchmarks.report import environment, shown, spread, versions, write
from electrax.models.sizes import ModelConfig, discriminator_shape
from electrax.tasks.classify import ClassifyTask

SIDES = ("electrax", "compiling", "torch")
TARGET = 0.65  # electrax / PyTorch
STEPS = 3  # after the first


def resident_mb(field: str, status: str = "") -> float:
    """`VmRSS`, or its greatest so far, `VmHWM`; of this process, or as another one's /proc/self/status says."""
    status = status or Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def bare_mb() -> float:
    """What Python with NumPy takes."""
    code = "import numpy; print(open('/proc/self/status').read())"
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    return resident_mb("VmRSS", run.stdout)


def forget_peak() -> None:
    """VmHWM starts again at what is resident now (man 5 proc, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def pretraining(options: argparse.Namespace, batch: int, side: str) -> Callable[[], Any]:
    config = pretrain_step.step_config(options.size, batch, options.length)
    if side == "torch":
        step = pretrain_step.torch_step(config)
        return lambda: float(step())
    training = pretrain_step.Training(config)
    return lambda: float(training.start())


def finetuning(options: argparse.Namespace, batch: int, side: str) -> Callable[[], Any]:
    encoder = discriminator_shape(ModelConfig(size=options.size), finetune_step.VOCABULARY)
    rows = finetune_step.random_rows(batch, options.length)
    if side != "torch":
        return finetune_step.electrax_step(encoder, rows, 0)[0]
    task = ClassifyTask(encoder, finetune_step.PAD, finetune_step.SEP, classes=finetune_step.CLASSES, style="dense")
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), rows))  # nothing of JAX shall run here
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.02 * random.standard_normal(s.shape).astype(s.dtype), shapes)
    return finetune_step.torch_step(encoder, rows, params)


WORK = {"pretrain": pretraining, "finetune": finetuning}


def measure(options: argparse.Namespace, work: str, batch: int, side: str) -> dict[str, float]:
    """In this process, which must be fresh."""
    foreign = 0.0
    if side == "torch":
        foreign = resident_mb("VmRSS") - bare_mb()
        import transformers
        from transformers import ElectraForPreTraining, ElectraForSequenceClassification  # noqa: F401

        transformers.logging.set_verbosity_error()
    before = resident_mb("VmRSS") - foreign
    run = WORK[work](options, batch, side)
    run()
    whole = resident_mb("VmHWM") - foreign
    forget_peak()
    for _ in range(STEPS):
        run()
    steps = resident_mb("VmHWM") - foreign
    return {"before": before, "steps": steps, "steps_added": steps - before, "whole": max(whole, steps)}


def measure_apart(options: argparse.Namespace, work: str, batch: int, side: str, cache: str) -> dict[str, float]:
    """In a new process."""
    words = ["--size", options.size, "--length", str(options.length), "--batch", str(batch), "--here", work, side]
    variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words], env=variables, stdout=subprocess.PIPE, check=True
    )
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--here", nargs=2, metavar=("WORK", "SIDE"), help="measure one side in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options, options.here[0], options.batch[0], options.here[1])))
        return
    here, rows = environment(versions("torch", "transformers")) | {"target_ratio": TARGET}, []
    with tempfile.TemporaryDirectory() as cache:
        for work in options.work:
            for batch in options.batch:
                found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
                found["compiling"].append(measure_apart(options, work, batch, "compiling", cache))  # fills the cache
                for _ in range(options.rounds):
                    for side in ("electrax", "torch"):
                        found[side].append(measure_apart(options, work, batch, side, cache))
                row: dict[str, Any] = {"work": work, "batch": batch, "length": options.length}
                for side, each in found.items():
                    row[side] = {name: spread([one[name] for one in each]) for name in each[0]}
                pairs = list(zip(found["electrax"], found["torch"], strict=True))
                row["ratio"] = {name: spread([a[name] / b[name] for a, b in pairs]) for name in pairs[0][0]}
                rows.append(row)
                print(f"{work} {options.size} {batch} x {options.length}")
                for side in SIDES:
                    figures = "   ".join(f"{name} {values['median']:6.0f}" for name, values in row[side].items())
                    print(f"    {side:10}{figures}  MB")
                print(
                    f"    electrax / torch: steps {shown(row['ratio']['steps'])}, steps_added "
                    f"{shown(row['ratio']['steps_added'])}, whole {shown(row['ratio']['whole'])}",
                    flush=True,
                )
                write("memory.json", here | {"rows": rows})  # what is there is kept, should a later row fail


if __name__ == "__main__":
    main()
