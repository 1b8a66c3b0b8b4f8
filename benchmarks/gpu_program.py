"""What a pretraining step asks of an NVIDIA H200, read from the program that is compiled for one, without one.

    pip install "jax[cuda12]==VERSION"    # of the JAX that is installed; 5 GB, no GPU or driver needed
    python -m benchmarks.gpu_program [--cases "base, L128" …]

The cases and variants are those of benchmarks.accelerator. For each: kernels that are launched, bytes that they read
and write, the memory that the step needs with its state and rows, and the time that this would take if a kernel took
BANDWIDTH or PRODUCTS, whichever lasts longer, and LAUNCH. Products are Triton's, as without a GPU none can be tried, so
bias and activation are kernels of their own where cuBLAS may take them in. Of what a kernel only cuts or gathers pieces
out of the pieces count, and of the fused kernels the bytes alone, not their products. So it says where the time goes,
and what a change saves; how long a step takes only a GPU says.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks.accelerator import CASES, FREE_BATCHES, WORDS, needed_bytes
from benchmarks.pretrain_step import SPECIAL, VOCABULARY, RandomCorpus, step_config
from benchmarks.report import environment, write
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import make_task
from electrax.training.optim import make_optimizer
from electrax.training.profile import part_of
from electrax.training.sharding import MeshConfig, batch_sharding, make_mesh
from electrax.training.state import abstract_state, make_step

BANDWIDTH = 4.0e12  # bytes a second; 4.8e12 nominal
PRODUCTS = 6.5e14  # FLOP a second; 9.89e14 nominal
LAUNCH = 2e-6  # seconds

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}

# -- the program -------------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    result: str  # type and shape
    kind: str
    operands: list[str]
    rest: str  # attributes


Computation = dict[str, Operation]


class Kernel(NamedTuple):
    name: str
    path: str  # by which JAX names what it computes
    bytes: int
    flops: int

    @property
    def seconds(self) -> float:
        return max(self.bytes / BANDWIDTH, self.flops / PRODUCTS) + LAUNCH


def computations(program: str) -> tuple[dict[str, Computation], str]:
    """Those of a compiled program in XLA's text, by name, and the name of the first one."""
    found: dict[str, Computation] = {}
    entry = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            own = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif body := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)(?= [\w\-]+\()|\S+) ([\w\-]+)\((.*)$", line):
            name, result, kind, rest = body.groups()
            operands = rest[: _closing(rest)]
            own[name] = Operation(result, kind, re.findall(r"%([\w.\-]+)", operands) or [operands], rest)
    return found, entry


def _closing(text: str) -> int:
    """Where the bracket that is open at the start ends."""
    depth = 1
    for place, sign in enumerate(text):
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if depth == 0:
            return place
    return len(text)


def kernels(program: dict[str, Computation], name: str) -> Iterator[Kernel]:
    """What is launched, loops as often as they are known to go round."""
    own = program[name]
    for at, operation in own.items():
        called = re.findall(r"(?:calls|to_apply|body)=%([\w.\-]+)", operation.rest)
        if operation.kind in ("while", "call"):
            times = re.search(r'known_trip_count":\{"n":"(\d+)"', operation.rest)
            yield from list(kernels(program, called[0])) * (int(times[1]) if times else 1)
        elif operation.kind == "conditional":
            yield from kernels(program, re.findall(r"%([\w.\-]+)", operation.rest.split("computations={")[1])[0])
        elif operation.kind not in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all"):
            inside = program[called[0]] if operation.kind == "fusion" else {}
            read = sum(read_bytes(own, inside, operation.operands, operand) for operand in set(operation.operands))
            flops = sum(dot_flops(inside, each) for each in inside.values() if each.kind == "dot")
            path = re.search(r'op_name="([^"]*)"', operation.rest)
            yield Kernel(at, path[1] if path else "", read + size_of(operation.result), flops)


def read_bytes(own: Computation, inside: Computation, operands: list[str], operand: str) -> int:
    """Of an operand: all, or where a fusion only cuts or gathers pieces out of it these."""
    if operand not in own:
        return 0
    place = str(operands.index(operand))
    names = [name for name, each in inside.items() if each.kind == "parameter" and each.operands == [place]]
    users = [each for each in inside.values() if set(names) & set(each.operands)]
    whole = size_of(own[operand].result)
    if users and all(user.kind in ("slice", "dynamic-slice", "gather") for user in users):
        return min(whole, sum(size_of(user.result) for user in users))
    return whole


def size_of(result: str) -> int:
    return sum(
        BYTES[kind] * int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    )


def dot_flops(own: Computation, dot: Operation) -> int:
    result, left = (
        [int(n) for n in re.search(r"\[([\d,]*)\]", text)[1].split(",")]
        for text in (dot.result, own[dot.operands[0]].result)
    )
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)[1]
    return 2 * int(np.prod(result + [left[int(axis)] for axis in summed.split(",")], dtype=np.int64))


# -- a step ------------------------------------------------------------------------------------------------------------


def compiled_step(config: PretrainConfig, device: jax.Device) -> tuple[jax.stages.Compiled, float]:
    """A step as it would be on that device, and its FLOPs."""
    mesh, corpus = make_mesh(MeshConfig(), [device]), RandomCorpus(config.data.max_length)
    task = make_task(config, VOCABULARY, SPECIAL, corpus)
    optimizer, rows = make_optimizer(config.optimizer, config.steps), task.train_batch(0)
    state = abstract_state(task, optimizer, rows, mesh)
    step = make_step(task, optimizer, state, mesh, config.optimizer.microbatch, config.seed)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), rows)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # so that kernels know the device as well
        return step.compiled(state, batch), task.flops(config.batch_size, config.data.max_length)


def describe(program: str) -> dict[str, Any]:
    launched = list(kernels(*computations(program)))
    parts: dict[str, Counter] = defaultdict(Counter)
    for kernel in launched:
        parts["matrix products" if kernel.flops else part_of(kernel.path)].update(
            kernels=1, bytes=kernel.bytes, seconds=kernel.seconds
        )
    by_time = sorted(parts.items(), key=lambda part: -part[1]["seconds"])
    return {
        "kernels": len(launched),
        "bytes": sum(kernel.bytes for kernel in launched),
        "product_flops": sum(kernel.flops for kernel in launched),  # without those inside fused kernels
        "seconds": sum(kernel.seconds for kernel in launched),
        "parts": {name: dict(part) for name, part in by_time},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    (device,) = topologies.get_topology_desc("", "cuda", target_config=H200, topology="1x1x1").devices
    jax.default_backend = lambda: "gpu"  # by which the models choose types and kernels
    results: dict[str, Any] = {}
    for name in options.cases:
        case = CASES[name]
        results[name] = {}
        for variant, words in case.variants.items():
            batch = case.batch or min(FREE_BATCHES)
            config = step_config(case.size, batch, case.length, *f"{WORDS} {case.words} {words}".split())
            compiled, flops = compiled_step(config, device)
            found = {"batch": batch, "needed_bytes": needed_bytes(compiled), "flops": flops}
            results[name][variant] = found = found | describe(compiled.as_text())
            print(
                f"{name:20}{variant:20}{found['batch']:>5} x {case.length:<5}{found['kernels']:>6} kernels "
                f"{found['bytes'] / 1e9:8.1f} GB {found['seconds'] * 1e3:8.2f} ms; needs "
                f"{found['needed_bytes'] / 1e9:.1f} GB",
                flush=True,
            )
            for part, figures in found["parts"].items():
                print(
                    f"    {part:32}{figures['kernels']:>6} kernels{figures['bytes'] / 1e9:8.1f} GB "
                    f"{figures['seconds'] * 1e3:8.2f} ms"
                )
    assumed = {"bytes_per_second": BANDWIDTH, "flops_per_second": PRODUCTS, "seconds_per_launch": LAUNCH}
    write("gpu_program.json", environment() | {"device": "none: compiled for an H200", "assumed": assumed} | results)


if __name__ == "__main__":
    main()
