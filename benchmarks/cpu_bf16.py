"""Whether bfloat16 is quicker than float32 on this CPU: matrix products in XLA by several routes and in PyTorch, and a
pretraining step of electrax.

    python -m benchmarks.cpu_bf16 [--rounds 9] [--step_rounds 5] [--routes default …]

The products are those of ELECTRA-Small with 4 rows of 128: three of the encoder and the vocabulary's. A route is a set
of XLA flags, each in a process of its own; in each process the forms of a product take turns, and ratios are to that
process's float32 product of the same round (below 1 is faster). `how` is what the compiled program does: a call into
YNNPACK or oneDNN, or a product on its own, and of which type.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import alternate, environment, ratios, shown, spread, versions, write

SHAPES = {  # rows x inner x columns
    "feed-forward up": (512, 256, 1024),
    "feed-forward down": (512, 1024, 256),
    "queries, keys, values": (512, 256, 768),
    "vocabulary": (76, 128, 30592),
}
ROUTES = {
    "default": "",
    "onednn": "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_custom_call=true",
    "ynn off": "--xla_cpu_experimental_ynn_fusion_type=",
    "no thunk runtime": "--xla_cpu_use_thunk_runtime=false",
}
PRODUCTS_A_ROUND = 20
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "avx_ne_convert")


def cpu_features() -> dict[str, bool]:
    """What /proc/cpuinfo says of instructions that a bfloat16 product could use."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: bool(flags) and name in flags[1].split() for name in FEATURES}


def measure(contestants: dict[str, Any], flops: float, rounds: int) -> dict[str, Any]:
    """Of each form GFLOP/s and the ratio of its time to float32's."""
    alternate(contestants, 1)  # compiles
    seconds = alternate(contestants, rounds)
    return {
        name: {
            "gflops": spread([PRODUCTS_A_ROUND * flops / value / 1e9 for value in values]),
            "ratio": ratios(seconds, name, "float32"),
        }
        for name, values in seconds.items()
    }


def xla_products(rounds: int) -> dict[str, Any]:
    """Each shape in each form, in this process."""
    import jax
    import jax.numpy as jnp

    preset = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    forms = {
        "float32": ("float32", jnp.matmul),
        "bfloat16": ("bfloat16", jnp.matmul),
        "bfloat16 into float32": ("bfloat16", functools.partial(jnp.matmul, preferred_element_type=jnp.float32)),
        "float32 as BF16_BF16_F32": ("float32", functools.partial(jnp.matmul, precision=preset)),
    }
    result = {}
    for shape, (rows, inner, columns) in SHAPES.items():
        contestants, how = {}, {}
        for name, (dtype, function) in forms.items():
            x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, inner)), dtype)
            y = jnp.asarray(np.random.default_rng(1).standard_normal((inner, columns)), dtype)
            compiled = jax.jit(function).lower(x, y).compile()
            how[name] = how_computed(compiled.as_text())
            contestants[name] = functools.partial(run_products, compiled, x, y)
        result[shape] = measure(contestants, 2.0 * rows * inner * columns, rounds)
        for name in forms:
            result[shape][name]["how"] = how[name]
    return result


def run_products(compiled: Any, x: Any, y: Any) -> None:
    for _ in range(PRODUCTS_A_ROUND):
        result = compiled(x, y)
    result.block_until_ready()


def how_computed(program: str) -> str:
    """Which library or product a compiled program comes down to."""
    for library, mark in {"YNNPACK": "__ynn_fusion", "oneDNN": "__onednn"}.items():
        if mark in program:
            return library
    found = re.search(r"= (\w+)\[[^\]]*\]\S* dot\((\w+\[)?", program)
    return f"dot of {operand_type(program)} into {found[1]}" if found else "a fusion"


def operand_type(program: str) -> str:
    """Of the product's first operand, which is named before it."""
    operand = re.search(r" dot\(%?([\w.\-]+)", program)
    found = operand and re.search(rf"%?{re.escape(operand[1])} = (\w+)\[", program)
    return found[1] if found else "?"


def torch_products(rounds: int) -> dict[str, Any]:
    import torch

    result = {}
    with torch.inference_mode():
        for shape, (rows, inner, columns) in SHAPES.items():
            contestants = {}
            for name in ("float32", "bfloat16"):
                dtype = getattr(torch, name)
                x, y = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
                contestants[name] = lambda x=x, y=y: [x @ y for _ in range(PRODUCTS_A_ROUND)][-1]
            result[shape] = measure(contestants, 2.0 * rows * inner * columns, rounds)
    return result


def step(rounds: int) -> dict[str, Any]:
    """A pretraining step of ELECTRA-Small, 16 x 128, in both types."""
    from benchmarks.pretrain_step import Training, step_config

    contestants = {}
    for dtype in ("float32", "bfloat16"):
        training = Training(step_config("small", 16, 128, f"--model.compute_dtype={dtype}"))
        contestants[dtype] = lambda t=training: float(t.start())
    losses = {name: run() for name, run in contestants.items()}  # compiles
    alternate(contestants, 1)
    seconds = alternate(contestants, rounds)
    return {
        "first_loss": losses,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": ratios(seconds, "bfloat16", "float32"),
    }


PARTS = {"products": xla_products, "torch": torch_products, "step": step}


def measure_apart(part: str, flags: str, rounds: int) -> dict[str, Any] | str:
    """A part in a new process under XLA flags; the last line of its complaint where it fails."""
    before = os.environ.get("XLA_FLAGS", "")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_bf16", "--here", part, "--rounds", str(rounds)],
        env=os.environ | {"XLA_FLAGS": f"{before} {flags}".strip()},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        return (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1][:200]
    return json.loads(run.stdout.splitlines()[-1])


def show(route: str, found: dict[str, Any] | str) -> None:
    if isinstance(found, str):
        print(f"{route}: {found}", flush=True)
        return
    print(route)
    for shape, forms in found.items():
        for name, form in forms.items():
            print(
                f"    {shape:22}{name:26}{form['gflops']['median']:6.0f} GFLOP/s   ratio {shown(form['ratio'])}   "
                f"{form.get('how', '')}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step_rounds", type=int, default=5, help="0: no step")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--here", choices=PARTS, help="measure a part in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(PARTS[options.here](options.rounds)))
        return
    features = cpu_features()
    print("this CPU has", ", ".join(name for name, there in features.items() if there))
    print("and has not", ", ".join(name for name, there in features.items() if not there))
    here = environment(versions("jaxlib", "torch"))
    results: dict[str, Any] = {"features": features, "routes": {}}
    for route in options.routes:
        found = measure_apart("products", ROUTES[route], options.rounds)
        results["routes"][route] = {"flags": ROUTES[route], "products": found}
        show(f"XLA, {route}", found)
        write("cpu_bf16.json", here | results)  # what is there is kept, should a later part take too long
    results["torch"] = measure_apart("torch", "", options.rounds)
    show("PyTorch", results["torch"])
    if options.step_rounds:
        results["step"] = found = measure_apart("step", "", options.step_rounds)
        if isinstance(found, str):
            print(f"step: {found}")
        else:
            print(f"step of ELECTRA-Small, 16 x 128: bfloat16 / float32 {shown(found['ratio'])}")
    write("cpu_bf16.json", here | results)


if __name__ == "__main__":
    main()
