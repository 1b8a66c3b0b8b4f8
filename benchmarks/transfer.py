"""What a pretrained encoder is worth: fine-tuned from it and from random weights of the same architecture, over seeds.

    python -m benchmarks.transfer --init_from runs/hour --glue ../shared/data/glue --wnut17 ../shared/data/ner/wnut17 \\
        [--section.key value ...]

The same tokenizer, rows, order, steps and learning rates on both sides; what the options beyond --help say, such as
--epochs or --optimizer.learning_rate, is said to both. Results are written after each task, and a task that is
finished in --workdir is not trained again, whatever the options. With `--first stsb` each side of the other tasks
starts from the best model of that side on STS-B, as the paper starts MRPC from MNLI: `mrpc after stsb`. STS-B is
trained without the rows that have a sentence of MRPC's dev set. `--mrpc_test` scores MRPC on its 1,725 labelled test
pairs instead, which nothing was chosen on.
"""

import argparse
import dataclasses
import pathlib
import re
import statistics

from benchmarks.report import environment, write
from electrax.cli import use_compilation_cache
from electrax.config import find_config, load
from electrax.experiment.config import FinetuneConfig, read_config
from electrax.experiment.finetune import SHAPE
from electrax.experiment.results import read_results
from electrax.report.common import show_table
from electrax.report.finetune import finetune_and_report

TASKS = ("sst2", "cola", "mrpc", "stsb", "wnut17")


def stsb_without_mrpc(glue: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A folder `out` with STS-B, but for training rows that have a sentence of MRPC's dev set: 63 of 5,749."""

    def lines(name: str) -> list[str]:
        return (glue / name).read_text(encoding="utf-8-sig").splitlines(keepends=True)

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    known = {plain(text) for line in lines("MRPC/dev.tsv") for text in line.split("\t")[3:5]}
    header, *rows = lines("STS-B/train.tsv")
    kept = [row for row in rows if known.isdisjoint(plain(text) for text in row.split("\t")[7:9])]
    (out / "STS-B").mkdir(parents=True, exist_ok=True)
    (out / "STS-B" / "train.tsv").write_text("".join([header, *kept]), encoding="utf-8")
    (out / "STS-B" / "dev.tsv").write_text("".join(lines("STS-B/dev.tsv")), encoding="utf-8")
    return out


def mrpc_by_test(glue: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A folder `out` that is `glue`, but for MRPC's dev set, which is its labelled test pairs."""
    glue, mrpc = glue.resolve(), out / "MRPC"
    if not out.exists():
        mrpc.mkdir(parents=True)
        (mrpc / "train.tsv").symlink_to(glue / "MRPC" / "train.tsv")
        (mrpc / "dev.tsv").symlink_to(glue / "MRPC" / "msr_paraphrase_test.txt")
        for task in glue.iterdir():
            if task.name != "MRPC":
                (out / task.name).symlink_to(task)
    return out


def configs(arguments: argparse.Namespace, name: str, options: list[str]) -> dict[str, FinetuneConfig]:
    """The two runs of a task."""
    task = load(FinetuneConfig, find_config(name, "finetune"), options)
    pretrained = read_config(arguments.init_from)
    shape = {key: getattr(pretrained.model, key) for key in SHAPE}
    top = pathlib.Path(arguments.workdir)
    path = arguments.wnut17 if name == "wnut17" else arguments.glue
    if name == "stsb":
        path = str(stsb_without_mrpc(pathlib.Path(arguments.glue), top / "glue"))
    data = dataclasses.replace(task.data, path=path, tokenizer=arguments.init_from)
    common = dataclasses.replace(task, seeds=arguments.seeds, data=data)
    workdir = top / title(arguments, name)
    starts = {"pretrained": arguments.init_from, "random": ""}
    if arguments.first and name != arguments.first:
        starts = {side: str(top / arguments.first / side) for side in starts}
    model = dataclasses.replace(task.model, **shape)
    return {
        side: dataclasses.replace(
            common, workdir=str(workdir / side), init_from=start, model=task.model if start else model
        )
        for side, start in starts.items()
    }


def title(arguments: argparse.Namespace, name: str) -> str:
    return f"{name} after {arguments.first}" if arguments.first and name != arguments.first else name


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
    parser.add_argument("--mrpc_test", action="store_true", help="score MRPC on its labelled test pairs")
    parser.add_argument("--wnut17", default="../shared/data/ner/wnut17")
    parser.add_argument("--workdir", default="runs/transfer")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--first", choices=TASKS, default="", help="a finished task, from whose models others start")
    parser.add_argument("--seeds", type=int, default=3)
    arguments, options = parser.parse_known_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2")
    if arguments.mrpc_test:
        arguments.glue = str(mrpc_by_test(pathlib.Path(arguments.glue), pathlib.Path(arguments.workdir) / "glue_test"))
    use_compilation_cache()
    results: dict = environment() | {"tasks": {}}
    for name in arguments.tasks:
        sides = {side: measure(config) for side, config in configs(arguments, name, options).items()}
        results["tasks"][title(arguments, name)] = sides
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
