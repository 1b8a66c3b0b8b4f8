"""What a shipped config learns, over seeds, with the time from command to table.

    python -m benchmarks.learning [--config tiny] [--seeds 3] [-- --section.key value …]

Runs `electrax pretrain CONFIG` as a user would, in a new process and a new directory a seed, text preparation,
compilation and evaluation included.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.report import environment, spread, write

SHOWN = ("seconds", "rtd_auc", "masked_accuracy", "unigram_accuracy", "mlm_loss", "unigram_loss", "replaced_share")


def train(config: str, seed: int, overrides: list[str], directory: str) -> dict:
    """The results of one run, with its wall seconds and CPU seconds."""
    workdir = pathlib.Path(directory) / f"seed-{seed}"
    command = [sys.executable, "-m", "electrax", "pretrain", config, "--seed", str(seed), "--workdir", str(workdir)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, *overrides], check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [{k: v for k, v in line.items() if k == "step" or k.startswith("eval_")} for line in lines]
    return {"seed": seed, "seconds": seconds, "cpu_seconds": cpu, **results, "curve": [c for c in curve if len(c) > 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="after --, as `electrax pretrain` takes them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        runs = [train(options.config, seed, options.overrides, directory) for seed in range(options.seeds)]
    print("seed  " + "  ".join(f"{name:>16}" for name in SHOWN))
    for run in runs:
        print(f"{run['seed']:>4}  " + "  ".join(f"{run[name]:>16.4f}" for name in SHOWN))
    summary = {name: spread([run[name] for run in runs]) for name in SHOWN}
    ratio = statistics.median(run["masked_accuracy"] / run["unigram_accuracy"] for run in runs)
    print(f"median AUC {summary['rtd_auc']['median']:.3f}; generator {ratio:.2f} times the unigram baseline")
    write(f"learning_{options.config}.json", environment() | {"summary": summary, "runs": runs})


if __name__ == "__main__":
    main()
