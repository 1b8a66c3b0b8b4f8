"""What the generator is worth to the discriminator: causal, hybrid, masked and uniform ones at equal steps.

    python -m benchmarks.generators --text TEXT_OR_CORPUS --data ../shared/data [--steps 20000] [--seeds 3]
    python -m benchmarks.generators --init_from benchmarks/weights --text CORPUS_OF_ITS_PIECES --steps 2500

Everything but the generator's kind is the same: text, order, chosen positions, sizes, steps, and the start: word
vectors of the same text (benchmarks/word_vectors.py; without them three million tokens taught nothing that SST-2 could
show), or a pretrained encoder that goes on. The generator begins at random weights with embeddings of its own; a masked
one that the encoder was pretrained with goes on.
`uniform` is the causal one sampled at a temperature at which every token is equally likely. Each discriminator is then
fine-tuned, and so is what all started from.
"""

import argparse
import json
import pathlib
from typing import Any

from benchmarks.report import environment, write
from benchmarks.word_vectors import start
from electrax.cli import use_compilation_cache
from electrax.config import build, find_config, load, read_toml
from electrax.experiment.config import FinetuneConfig, PretrainConfig
from electrax.experiment.results import read_results
from electrax.report.common import show_table
from electrax.report.finetune import finetune_and_report
from electrax.report.pretrain import pretrain_and_report

KINDS = ("causal", "hybrid", "masked", "uniform")
START = "the start alone"
TASKS = {"sst2": "glue", "cola": "glue", "stsb": "glue", "upos": "tagging/ud_english_ewt"}


def pretraining(arguments: argparse.Namespace, kind: str) -> PretrainConfig:
    # a generator that shares the table draws it to what its own loss asks for, the causal one most of all
    own = {"kind": "causal" if kind in ("uniform", START) else kind, "embeddings": "separate"}
    objective = {"temperature": 1e6} if kind == "uniform" else {}
    values: dict[str, Any] = {
        "workdir": str(pathlib.Path(arguments.workdir) / kind.replace(" ", "-")),
        "steps": arguments.steps,
        "batch_size": 16,
        "model": {"size": "tiny", "body": "modern", "layers": 3, "width": 128, "embedding_width": 128, "dropout": 0.0,
                  "attention_dropout": 0.0},
        "generator": {"width": 64, "layers": 3, **own},
        "objective": objective,
        "data": {"path": arguments.text, "vocab_size": 4096, "max_length": 64},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": arguments.steps / 10},
        "eval": {"every": max(1, arguments.steps // 10), "rows": 512},
        "checkpoint": {"every": arguments.steps},
    }  # fmt: skip
    if arguments.init_from:
        before = read_toml(pathlib.Path(arguments.init_from) / "config.toml")
        values |= {
            "init_from": arguments.init_from,
            "model": before["model"],
            "generator": before["generator"] | (own if kind != "masked" else {}),  # which goes on as it is
            "objective": before["objective"] | objective,
            "data": {"path": arguments.text, "max_length": 128},
            "optimizer": {"learning_rate": 6e-4, "warmup_steps": arguments.steps / 10},
        }
    return build(PretrainConfig, values, "the benchmark")


def pretrained(arguments: argparse.Namespace, kind: str) -> tuple[pathlib.Path, dict]:
    """Where it is; its figures on held-out text and its curve, where it was trained."""
    config = pretraining(arguments, kind)
    workdir = pathlib.Path(config.workdir)
    if arguments.init_from and kind == START:
        return pathlib.Path(arguments.init_from), {}
    if not (arguments.init_from or (workdir / "checkpoints").is_dir()):
        start(config)
    if kind == START:
        return workdir, {}
    if not (workdir / "results.json").is_file() and pretrain_and_report(config, "the same command"):
        raise SystemExit("stopped; the same command continues")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {key.removeprefix("eval_"): line[key] for key in ("step", "eval_rtd_auc", "eval_mlm_loss")}
        for line in lines
        if "eval_rtd_auc" in line
    ]
    return workdir, {"figures": json.loads((workdir / "results.json").read_text()), "curve": curve}


def fine_tuned(arguments: argparse.Namespace, kind: str, first: pathlib.Path, task: str) -> dict:
    workdir = pathlib.Path(arguments.workdir) / f"{kind.replace(' ', '-')}-{task}"
    if read_results(workdir) is None:
        options = [
            f"--workdir={workdir}", f"--init_from={first}", f"--data.path={arguments.data}/{TASKS[task]}",
            f"--data.limit={arguments.rows}", f"--seeds={arguments.seeds}", "--data.max_length=64", "--epochs=5",
        ]  # fmt: skip
        config = load(FinetuneConfig, find_config(task, "finetune"), options)
        if finetune_and_report(config, "the same command"):
            raise SystemExit("stopped; the same command continues")
    found = read_results(workdir)
    assert found is not None
    return {key: found[key] for key in ("metric", "scores", "mean", "std", "failed")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="../shared/data/pretrain/train-000.txt.xz", help="or a prepared corpus")
    parser.add_argument("--data", default="../shared/data", help="folder of glue and tagging/ud_english_ewt")
    parser.add_argument("--workdir", default="runs/generators")
    parser.add_argument("--init_from", default="", help="a pretrained encoder, instead of word vectors of the text")
    kinds = (START, *KINDS)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--rows", type=int, default=8000, help="of each task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="generators.json", help="in benchmarks/results")
    arguments = parser.parse_args()
    use_compilation_cache()
    results: dict = environment() | {"options": vars(arguments), "kinds": {}}
    for kind in arguments.kinds:
        workdir, found = pretrained(arguments, kind)
        results["kinds"][kind] = found | {task: fine_tuned(arguments, kind, workdir, task) for task in TASKS}
        write(arguments.out, results)
    rows = [
        (kind, found.get("figures", {}).get("rtd_auc", ""), found.get("figures", {}).get("replaced_share", ""))
        + tuple(f"{found[task]['mean']:.3f} ± {found[task]['std']:.3f}" for task in TASKS)
        for kind, found in results["kinds"].items()
    ]
    columns = ("generator", "its discriminator's AUC", "replaced share", *TASKS)
    show_table("after equal steps", columns, rows)


if __name__ == "__main__":
    main()
