"""What a pretrained encoder is worth: fine-tuned from it and from random weights of the same architecture, over seeds.

    python -m benchmarks.transfer --init_from runs/hour --glue ../shared/data/glue --wnut17 ../shared/data/ner/wnut17 \\
        [--section.key value ...]

The same tokenizer, rows, order, steps and learning rates on both sides; what the options beyond --help say, such as
--epochs or --optimizer.learning_rate, is said to both. Results are written after each task, and a task that is finished
in --workdir is not trained again, whatever the options.
"""

import argparse
import dataclasses
import pathlib
import statistics

from benchmarks.report import environment, write
from electrax.cli import use_compilation_cache
from electrax.config import find_config, load
from electrax.experiment.config import FinetuneConfig, read_config
from electrax.experiment.finetune import SHAPE
from electrax.report.common import show_table
from electrax.report.finetune import finetune_and_report, read_results

TASKS = ("sst2", "cola", "mrpc", "stsb", "wnut17")


def configs(arguments: argparse.Namespace, name: str, options: list[str]) -> dict[str, FinetuneConfig]:
    """The two runs of a task."""
    task = load(FinetuneConfig, find_config(name, "finetune"), options)
    pretrained = read_config(arguments.init_from)
    shape = {key: getattr(pretrained.model, key) for key in SHAPE}
    common = dataclasses.replace(
        task,
        seeds=arguments.seeds,
        data=dataclasses.replace(
            task.data,
            path=arguments.wnut17 if name == "wnut17" else arguments.glue,
            tokenizer=arguments.init_from,
        ),
    )
    workdir = pathlib.Path(arguments.workdir) / name
    return {
        "pretrained": dataclasses.replace(common, workdir=str(workdir / "pretrained"), init_from=arguments.init_from),
        "random": dataclasses.replace(
            common, workdir=str(workdir / "random"), model=dataclasses.replace(task.model, **shape)
        ),
    }


def measure(config: FinetuneConfig) -> dict:
    """Metric, scores, mean and standard deviation of one side of a task, and how long it was trained."""
    workdir = pathlib.Path(config.workdir)
    if read_results(workdir) is None and finetune_and_report(config, "the same command"):
        raise SystemExit("stopped; the same command continues")
    results = read_results(workdir)
    trained = read_config(workdir)  # a finished one may have been trained with other options
    found = {key: results.get(key) for key in ("metric", "scores", "mean", "std", "failed")}
    rates = {key: getattr(trained.optimizer, key) for key in ("learning_rate", "layer_decay")}
    rows = {"training_rows": trained.data.limit or "all", "both_orders": trained.data.both_orders}
    return found | {"epochs": trained.epochs, "steps": results["step"]} | rows | rates


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--init_from", required=True, help="work directory of a pretraining")
    parser.add_argument("--glue", default="../shared/data/glue")
    parser.add_argument("--wnut17", default="../shared/data/ner/wnut17")
    parser.add_argument("--workdir", default="runs/transfer")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    arguments, options = parser.parse_known_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2")
    use_compilation_cache()
    results: dict = environment() | {"tasks": {}}
    for name in arguments.tasks:
        results["tasks"][name] = {start: measure(config) for start, config in configs(arguments, name, options).items()}
        write("transfer.json", results)
    rows = []
    for name, sides in results["tasks"].items():
        pretrained, random = sides["pretrained"], sides["random"]
        gain = statistics.mean(pretrained["scores"]) - statistics.mean(random["scores"])
        shown = [f"{side['mean']:.3f} ± {side['std']:.3f}" for side in (pretrained, random)]
        rows.append((name, pretrained["metric"], *shown, gain))
    show_table("dev scores, mean ± standard deviation", ("task", "metric", "pretrained", "random", "gain"), rows)


if __name__ == "__main__":
    main()
