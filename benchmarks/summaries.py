"""Summaries against the beginning of their source: ROUGE of a trained model's outputs and of the lead.

    electrax finetune headlines --data.path ../shared/data/sum/wikinews-headlines --init_from benchmarks/weights
    python -m benchmarks.summaries --data ../shared/data/sum [--headlines runs/headlines] [--scitldr runs/scitldr]

The lead is the source's first sentence or its first words, as many of them as score best on the dev rows themselves. A
run that is not there is left out.
"""

import argparse
import gzip
import json
import pathlib
import re
from collections.abc import Sequence

from benchmarks.report import environment, write
from electrax.experiment.results import read_results
from electrax.report.common import show_table
from electrax.tasks.texts import METRICS, figures

DEV = {"headlines": "wikinews-headlines/valid.jsonl.gz", "scitldr": "scitldr-a/dev.jsonl.gz"}
ROUGE = METRICS[2:]
MOST_WORDS = 30


def read(path: pathlib.Path) -> tuple[list[list[str]], list[tuple[str, ...]]]:
    """The sentences of each source, and its references."""
    sources, references = [], []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            source, target = row["source"], row["target"]
            sources.append(source if isinstance(source, list) else re.split(r"(?<=[.!?])\s+", source.strip()))
            references.append(tuple(target) if isinstance(target, list) else (target,))
    return sources, references


def leads(sources: Sequence[Sequence[str]], references: Sequence[tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """Figures of the first sentence, and of the first words, of which there are as many as give the best ROUGE-L."""
    words = [" ".join(sentences).split() for sentences in sources]
    cut = {n: figures("rougeL", [" ".join(row[:n]) for row in words], references) for n in range(4, MOST_WORDS + 1, 2)}
    best = max(cut, key=lambda n: cut[n]["rougeL"])
    return {
        "first sentence": figures("rougeL", [sentences[0] for sentences in sources], references),
        f"first {best} words": cut[best],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/sum")
    for name in DEV:
        parser.add_argument(f"--{name}", default=f"runs/{name}", help="work directory of the fine-tuning")
    arguments = parser.parse_args()
    results: dict = environment() | {"tasks": {}}
    for name, path in DEV.items():
        found: dict = leads(*read(pathlib.Path(arguments.data) / path))
        trained = read_results(pathlib.Path(getattr(arguments, name)))
        if trained is not None:
            found["trained"] = {key: trained["metrics"][key] for key in (*ROUGE, "loss")}
            found["trained"] |= {"step": trained["step"], "examples": trained["examples"]}
        results["tasks"][name] = found
    write("summaries.json", results)
    rows = [
        (task, what, *(f"{values[key]:.1f}" for key in ROUGE))
        for task, found in results["tasks"].items()
        for what, values in found.items()
    ]
    show_table("dev rows", ("task", "summary", *ROUGE), rows)


if __name__ == "__main__":
    main()
