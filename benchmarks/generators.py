"""What the generator is worth to the discriminator: causal, hybrid, masked and uniform ones at equal steps.

    python -m benchmarks.generators --text TEXT --glue ../shared/data/glue [--steps 3000] [--seeds 3]

Everything but the generator's kind is the same: text, order, chosen positions, sizes, steps. `uniform` is the masked
one sampled at a temperature at which every token is equally likely. Each discriminator is then fine-tuned on SST-2.
"""

import argparse
import json
import pathlib
from typing import Any

from benchmarks.report import environment, write
from electrax.cli import use_compilation_cache
from electrax.config import build, find_config, load
from electrax.experiment.config import FinetuneConfig, PretrainConfig
from electrax.report.common import show_table
from electrax.report.finetune import finetune_and_report, read_results
from electrax.report.pretrain import pretrain_and_report

KINDS: dict[str, dict[str, Any]] = {
    "causal": {"generator": {"kind": "causal"}},
    "hybrid": {"generator": {"kind": "hybrid"}},
    "masked": {},
    "uniform": {"objective": {"temperature": 1e6}},
}


def pretrained(arguments: argparse.Namespace, kind: str) -> tuple[pathlib.Path, dict]:
    """Where it is, its figures on held-out text, and its curve."""
    workdir = pathlib.Path(arguments.workdir) / kind
    values: dict[str, Any] = {
        "workdir": str(workdir),
        "steps": arguments.steps,
        "batch_size": 16,
        "model": {"size": "tiny", "body": "modern", "layers": 3, "width": 128, "embedding_width": 128, "dropout": 0.0,
                  "attention_dropout": 0.0},
        "generator": {"width": 64, "layers": 3, **KINDS[kind].get("generator", {})},
        "objective": KINDS[kind].get("objective", {}),
        "data": {"path": arguments.text, "vocab_size": 1000, "max_length": 64},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": arguments.steps / 10},
        "eval": {"every": max(1, arguments.steps // 10), "rows": 512},
        "checkpoint": {"every": arguments.steps},
    }  # fmt: skip
    if not (workdir / "results.json").is_file() and pretrain_and_report(
        build(PretrainConfig, values, "the benchmark"), "the same command"
    ):
        raise SystemExit("stopped; the same command continues")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {key.removeprefix("eval_"): line[key] for key in ("step", "eval_rtd_auc", "eval_mlm_loss")}
        for line in lines
        if "eval_rtd_auc" in line
    ]
    return workdir, {"figures": json.loads((workdir / "results.json").read_text()), "curve": curve}


def fine_tuned(arguments: argparse.Namespace, start: pathlib.Path) -> dict:
    workdir = pathlib.Path(f"{start}-sst2")
    if read_results(workdir) is None:
        options = [
            f"--workdir={workdir}", f"--init_from={start}", f"--data.path={arguments.glue}", "--data.max_length=64",
            f"--data.limit={arguments.rows}", f"--seeds={arguments.seeds}", "--epochs=3",
            "--optimizer.learning_rate=1e-3", "--optimizer.layer_decay=1",
        ]  # fmt: skip
        config = load(FinetuneConfig, find_config("sst2", "finetune"), options)
        if finetune_and_report(config, "the same command"):
            raise SystemExit("stopped; the same command continues")
    found = read_results(workdir)
    assert found is not None
    return {key: found[key] for key in ("metric", "scores", "mean", "std", "failed")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="../shared/data/pretrain/train-000.txt.xz")
    parser.add_argument("--glue", default="../shared/data/glue")
    parser.add_argument("--workdir", default="runs/generators")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=("causal", "uniform", "masked", "hybrid"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=5000, help="of SST-2")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    use_compilation_cache()
    results: dict = environment() | {"options": vars(arguments), "kinds": {}}
    for kind in arguments.kinds:
        workdir, found = pretrained(arguments, kind)
        results["kinds"][kind] = found | {"sst2": fine_tuned(arguments, workdir)}
        write("generators.json", results)
    rows = [
        (kind, found["figures"]["rtd_auc"], found["figures"]["replaced_share"],
         f"{found['sst2']['mean']:.3f} ± {found['sst2']['std']:.3f}")
        for kind, found in results["kinds"].items()
    ]  # fmt: skip
    columns = ("generator", "its discriminator's AUC", "replaced share", "SST-2 accuracy")
    show_table("after equal steps", columns, rows)


if __name__ == "__main__":
    main()
