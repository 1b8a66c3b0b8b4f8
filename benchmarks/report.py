"""What every benchmark writes beside its figures: where, when and with what they were measured."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "numpy", "tokenizers", "sentencepiece")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; they take turns, so that what disturbs one disturbs the other."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, and what a tenth of the values lies below and above."""
    p10, median, p90 = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def ratios(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> dict[str, float]:
    """The spread of one contestant's times as a share of another's in the same rounds."""
    return spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """A spread as "median [least, greatest]"."""
    return f"{values['median']:.{digits}f} [{values['min']:.{digits}f}, {values['max']:.{digits}f}]"


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages, which need not be imported."""
    return {name: version(name) for name in packages}


def require_cpu() -> None:
    """Ends the program where JAX would compute elsewhere than PyTorch, which it compares with on the CPU."""
    import jax

    if (backend := jax.default_backend()) != "cpu":
        print(
            f"{_program()}: PyTorch takes the CPU here, and JAX the {backend}; set JAX_PLATFORMS=cpu", file=sys.stderr
        )
        sys.exit(2)


def environment(versions: dict[str, str] | None = None) -> dict:
    """Device, versions, date and command."""
    import jax

    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _program(), *sys.argv[1:]]),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": f"{cpu or platform.processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES} | (versions or {}),
    }


def write(name: str, results: dict) -> Path:
    """Puts results/NAME in place; prints where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def _program() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
