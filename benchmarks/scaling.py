"""How training should scale over devices, predicted from the bytes that a compiled step exchanges.

    python -m benchmarks.scaling

Each size's step is compiled for eight imagined devices along `data`, and what its program exchanges is read from it:
the gradients, once. The time of that exchange over a ring at the links' stated speed stands against the time of the
matrix products at the stated utilisation, with the rows of a device held fixed (weak scaling).
"""

import dataclasses
import sys

from benchmarks.report import environment, write
from electrax.config import find_config, load
from electrax.experiment.config import PretrainConfig
from electrax.experiment.plan import Plan
from electrax.experiment.pretrain import make_task, plan
from electrax.report.common import show_table

MFU = 0.4  # assumed
BACKWARD = 2 / 3  # of a step's time, in which the exchange can go on as gradients become known
ROWS = {"small": 128, "base": 32, "large": 16}  # of a device


@dataclasses.dataclass(frozen=True)
class Machine:
    peak: float  # FLOP/s in bfloat16 of a device
    links: dict[int, float]  # devices -> bytes/s that a device sends over the slowest link of the ring


MACHINES = {
    # NVLink 4 within a node of eight, one 400 Gbit/s InfiniBand port for each GPU between nodes
    "H100 SXM": Machine(989e12, {8: 450e9, 64: 50e9}),
    # four ICI links of 400 Gbit/s; a ring uses one pair of them
    "TPU v5e": Machine(197e12, {8: 100e9, 64: 100e9}),
}


def predict(sent: float, flops: float, machine: Machine, devices: int) -> dict[str, float]:
    """Efficiency against one device, the exchange after the step and beside its backward pass; `sent` in bytes, `flops`
    of one device."""
    compute, exchange = flops / (MFU * machine.peak), sent / machine.links[devices]
    beside = compute + max(0.0, exchange - BACKWARD * compute)
    return {
        "compute_ms": 1e3 * compute,
        "exchange_ms": 1e3 * exchange,
        "after": compute / (compute + exchange),
        "beside": compute / beside,
    }


def step_of(size: str) -> tuple[Plan, float]:
    """What a step of eight devices needs, and the FLOPs of one of them."""
    path = find_config(size, "pretrain")
    options = [f"--batch_size={8 * ROWS[size]}", "--mesh.data=8", "--workdir=none", "--dry_run", "--data.path=none"]
    config = load(PretrainConfig, path, [*options, f"--optimizer.microbatch={ROWS[size]}"])
    special = {role: number for number, role in enumerate(("pad", "unk", "cls", "sep", "mask"))}
    task = make_task(config, config.data.vocab_size, special, None)
    return plan(config), task.flops(ROWS[size], config.data.max_length)


def main() -> None:
    results, rows = {}, []
    for size in sys.argv[1:] or ROWS:
        found, flops = step_of(size)
        gradients = [c for c in found.collectives if c.size > 1e6]
        assert {c.kind for c in gradients} == {"all-reduce"} and all(c.times == 1 for c in gradients)
        whole = sum(c.size for c in found.collectives)
        results[size] = {
            "parameters_bytes": found.parameters,
            "exchanged_bytes": whole,
            "flops": flops,
            "predicted": {},
        }
        for name, machine in MACHINES.items():
            for devices in machine.links:
                made = predict(2 * whole * (devices - 1) / devices, flops, machine, devices)
                results[size]["predicted"][f"{devices} x {name}"] = made
                share = [f"{made[key]:.1%}" for key in ("after", "beside")]
                times = [f"{made[key]:.2f}" for key in ("compute_ms", "exchange_ms")]
                rows.append((size, f"{devices} x {name}", f"{ROWS[size]}", *times, *share))
    titles = ("size", "devices", "rows of a device", "products ms", "exchange ms", "after the step", "beside backward")
    show_table("predicted efficiency", titles, rows)
    write("scaling.json", {"environment": environment(), "mfu": MFU, "machines": _told(), "results": results})


def _told() -> dict:
    return {name: dataclasses.asdict(machine) for name, machine in MACHINES.items()}


if __name__ == "__main__":
    main()
