"""Fine-tuning on few labelled rows, with and without rows that a generator made of them, over seeds.

    python -m benchmarks.augmentation --glue ../shared/data/glue [--init_from benchmarks/weights] [--rows 500]

Three kinds of run on the same rows: without more; with as many again by replaced tokens that keep their label; with
those that the best of the first runs labels, where it is sure of it. Each trains for the same number of steps. The
pretrained model is the generator and the discriminator that filters, too.
"""

import argparse
import pathlib

from benchmarks.report import environment, write
from electrax.cli import use_compilation_cache
from electrax.config import build, find_config, load
from electrax.experiment.augment import AugmentConfig, augment
from electrax.experiment.config import FinetuneConfig
from electrax.experiment.results import read_results
from electrax.report.common import show_table
from electrax.report.finetune import finetune_and_report

TASKS = ("sst2", "mrpc")


def trained(arguments: argparse.Namespace, task: str, kind: str, more: str = "") -> dict:
    """Results of the seeds of one kind of run; one that is finished is not trained again."""
    workdir = pathlib.Path(arguments.workdir) / task / kind
    if (found := read_results(workdir)) is not None:
        return found
    steps = arguments.epochs * -(-arguments.rows // 32)
    options = [
        f"--workdir={workdir}", f"--init_from={arguments.init_from}", f"--data.path={arguments.glue}",
        f"--data.limit={arguments.rows}", f"--seeds={arguments.seeds}", f"--steps={steps}", f"--eval.every={steps}",
        "--data.both_orders=false", f"--optimizer.learning_rate={arguments.learning_rate}", "--optimizer.layer_decay=1",
    ]  # fmt: skip
    config = load(
        FinetuneConfig, find_config(task, "finetune"), [*options, *([f"--data.augment={more}"] if more else [])]
    )
    if finetune_and_report(config, "the same command"):
        raise SystemExit("stopped; the same command continues")
    found = read_results(workdir)
    assert found is not None
    return found


def made(arguments: argparse.Namespace, task: str, kind: str, **options: object) -> tuple[str, dict[str, int]]:
    """New rows, and how many there are."""
    out = pathlib.Path(arguments.workdir) / task / f"{kind}.jsonl"
    values = {"dataset": arguments.glue, "out": str(out), "generator": arguments.init_from, "per_row": 3, "keep": 0.5}
    values |= {"data": {"format": "glue", "glue": task, "limit": arguments.rows, "max_length": 64}, **options}
    return str(out), augment(build(AugmentConfig, values, "the benchmark"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", default="../shared/data/glue")
    parser.add_argument("--init_from", default="benchmarks/weights")
    parser.add_argument("--workdir", default="runs/augmentation")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    use_compilation_cache()
    results: dict = environment() | {"options": vars(arguments), "tasks": {}}
    for task in arguments.tasks:
        sides: dict = {"without": trained(arguments, task, "without")}
        best = str(pathlib.Path(arguments.workdir) / task / "without")
        counts = {"without": {}}
        for kind, options in {"old labels": {}, "taught": {"teacher": best, "min_confidence": 0.9}}.items():
            more, counts[kind] = made(arguments, task, kind.replace(" ", "-"), **options)
            sides[kind] = trained(arguments, task, kind.replace(" ", "-"), more)
        keys = ("metric", "scores", "mean", "std", "failed")
        results["tasks"][task] = {
            kind: {key: found.get(key) for key in keys} | {"made": counts[kind]} for kind, found in sides.items()
        }
        write("augmentation.json", results)
    rows = [
        (task, kind, found["metric"], f"{found['mean']:.3f} ± {found['std']:.3f}")
        for task, sides in results["tasks"].items()
        for kind, found in sides.items()
    ]
    show_table("dev scores, mean ± standard deviation", ("task", "rows", "metric", "score"), rows)


if __name__ == "__main__":
    main()
