"""Every TOML file under configs/ is a runnable experiment that is what its header says."""

import functools
import json
import math
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

from electrax.config import find_config, load
from electrax.data.glue import GLUE
from electrax.experiment.config import FinetuneConfig, PretrainConfig
from electrax.experiment.glue import GlueConfig
from electrax.experiment.pretrain import make_task
from tests.fixtures.finetuning import (
    GLUE_FILES,
    NOUNS,
    QUESTIONS,
    QUICK,
    REVIEWS,
    call,
    make_pretrained,
    metrics_of,
    results_of,
    squad,
    write,
    write_glue,
    write_rows,
)

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
PRETRAIN = sorted(CONFIGS.glob("pretrain/*.toml"))
SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}

ids = pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)


def header(path):
    """The comment above the first key."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


@functools.cache
def parameters(path):
    """Parameters by tower, with shapes alone."""
    config = load(PretrainConfig, path, ["--workdir", "runs/any"])  # the others leave it to the command line
    task = make_task(config, config.data.vocab_size, SPECIAL_IDS, None)
    batch = {"ids": np.zeros((1, config.data.max_length), np.int32)}
    tree = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in tree.items()}


def test_there_are_shipped_configs():
    assert "tiny" in [path.stem for path in PRETRAIN]


@ids
def test_a_shipped_config_loads_and_builds_its_towers(path):
    assert {"embeddings", "generator"} <= set(parameters(path))


@ids
def test_a_shipped_config_says_in_its_header_how_to_run_it(path):
    assert re.search(rf"electrax pretrain (configs/pretrain/)?{re.escape(path.stem)}(\.toml)?(?!\S)", header(path))


@ids
def test_a_shipped_config_has_the_parameters_its_header_states(path):
    """ "12,345 parameters" is exact and "13.5 M parameters" is rounded; either is of all parts or of one of them, or
    of embeddings and discriminator, the part that is fine-tuned."""
    stated = re.findall(r"(\d[\d,.]*)( ?M| million)? parameters", header(path))
    if not stated:
        return
    sizes = parameters(path)
    kept = sizes["embeddings"] + sizes.get("discriminator", 0)
    real = {*sizes.values(), sum(sizes.values()), kept}
    for digits, millions in stated:
        digits = digits.replace(",", "")
        decimals = len(digits.partition(".")[2])
        possible = {round(size / 1e6, decimals) for size in real} if millions else real
        assert float(digits) in possible, f"{digits}{millions} is none of {sorted(real)}"


# -- fine-tuning -------------------------------------------------------------------------------------------------------

FINETUNE = sorted(CONFIGS.glob("finetune/*.toml"))
ONE_TASK = [path for path in FINETUNE if path.stem != "glue"]
SCORES = {
    "accuracy": "accuracy",
    "Matthews correlation": "matthews",
    "Spearman correlation": "spearman",
    "F1": "f1",
    "F1 of entities": "f1",
    "F1 of phrases": "f1",
    "BLEU": "bleu",
    "ROUGE-L": "rougeL",
}
# columns of CoNLL's files: word, other columns, tag
SENTENCES = [[(noun, tag), ("sat", "O"), ("on", "O"), ("red", other), ("house", f"I-{other[2:]}")]
             for noun in NOUNS for tag, other in (("B-NP", "B-VP"), ("B-VP", "B-NP"))]  # fmt: skip


def sentences(between, spans="", start=""):
    """Sentences with a word a line; `spans` are the names of the two kinds of span."""
    text = start
    for sentence in SENTENCES:
        for word, tag in sentence:
            for kind, name in zip(("NP", "VP"), spans or ("NP", "VP"), strict=True):
                tag = tag.replace(kind, name)
            text += f"{word}{between}{tag}\n"
        text += "\n"
    return text


def conllu():
    lines = []
    for number, sentence in enumerate(SENTENCES):
        lines.append(f"# sent_id = {number}")
        lines += [f"{i}\t{word}\t{word}\t{'NOUN' if i == 1 else 'VERB'}\tX\t_\t0\troot\t_\t_"
                  for i, (word, _) in enumerate(sentence, 1)]  # fmt: skip
        lines.append("")
    return "\n".join(lines) + "\n"


def mrqa():
    lines = ['{"header": {"dataset": "a", "split": "train"}}']
    for id, question, context, answer in QUESTIONS[:8]:
        span = [context.index(answer), context.index(answer) + len(answer) - 1]
        detected = [{"text": answer, "char_spans": [span], "token_spans": [[0, 0]]}]
        qa = {"qid": id, "question": question, "answers": [answer], "detected_answers": detected}
        lines.append(json.dumps({"id": "", "context": context, "qas": [qa]}))
    return "\n".join(lines) + "\n"


def miniature(name, folder):
    """Writes a few rows in the format of the benchmark's own files; the words that name them."""
    unanswerable = [(id + "n", "who sat", context, "") for id, _, context, _ in QUESTIONS[:4]]
    files = {
        "chunk": {"train.txt": sentences(" DT ")},
        "conll2003": {name: sentences(" NN I-NP ", ("PER", "LOC"), "-DOCSTART- -X- O O\n\n")
                      for name in ("eng.train", "eng.testa")},
        "wnut17": {name: sentences("\t", ("person", "location"))
                   for name in ("wnut17train.conll", "emerging.dev.conll")},
        "upos": {f"en_ewt-ud-{split}.conllu": conllu() for split in ("train", "dev")},
        "squad1": {f"{split}-v1.1.json": squad(QUESTIONS[:8]) for split in ("train", "dev")},
        "squad2": {f"{split}-v2.0.json": squad(QUESTIONS[:4] + unanswerable) for split in ("train", "dev")},
        "mrqa": {"a.jsonl": mrqa(), "b.jsonl": mrqa()},
    }  # fmt: skip
    texts = [("the red film", "der rote film"), ("a good play", "ein gutes spiel")] * 8
    for split in ("train", "val") if name.startswith("multi30k") else ():
        for place, language in enumerate(("en", "de")):
            write(folder / f"{split}.{language}", "".join(f"{pair[place]}\n" for pair in texts))
    for split in ("train", "valid", "dev") if name in ("headlines", "scitldr") else ():
        rows = [{"source": [f"{a}.", "it was so"] if name == "scitldr" else a, "target": [b, a]} for a, b in texts]
        write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if name == "csv":
        return ["--data.path", write_rows(folder / "reviews.csv", REVIEWS)]
    if name in GLUE_FILES:
        write_glue(folder, name, ("train", "dev_matched" if name == "mnli" else "dev"))
    for file, text in files.get(name, {}).items():
        write(folder / file, text)
    more = ["--data.train", "a.jsonl", "--data.dev", "b.jsonl"] if name == "mrqa" else []
    return ["--data.path", folder, *more]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return make_pretrained(tmp_path_factory.mktemp("pretraining") / "run")


def commands(path):
    """The commands in the header, as words."""
    return [shlex.split(line)[2:] for line in header(path).splitlines() if line.startswith("electrax finetune ")]


def test_there_is_a_config_for_every_task_of_glue():
    assert set(GLUE_FILES) == set(GLUE) == set(GlueConfig(path="any").tasks)
    assert set(GLUE_FILES) < {path.stem for path in FINETUNE}


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_the_commands_in_a_header_of_fine_tuning_are_valid(path):
    assert commands(path)
    assert all("--data.path" in words or "--path" in words for words in commands(path))
    for name, *words in commands(path):
        assert find_config(name, "finetune") == path
        load(GlueConfig if name == "glue" else FinetuneConfig, path, words)


@pytest.mark.parametrize("path", [path for path in ONE_TASK if path.stem in GLUE], ids=lambda path: path.stem)
def test_a_config_of_glue_has_the_classes_and_orders_of_its_task(path):
    config, task = load(FinetuneConfig, path), GLUE[path.stem]
    assert (config.data.format, config.data.glue) == ("glue", path.stem)
    assert config.head.kind == ("classes" if task.classes else "number")
    assert config.data.both_orders == task.both_orders


@pytest.mark.parametrize("path", ONE_TASK, ids=lambda path: path.stem)
def test_a_shipped_config_trains_on_a_miniature_of_its_data(path, pretrained, tmp_path):
    words = miniature(path.stem, tmp_path / "data")
    fresh = path.stem == "csv" or path.stem.startswith("multi30k")
    start = ["--model.layers=1", "--model.width=16", "--model.heads=2"] if fresh else []
    small = load(FinetuneConfig, path).task == "rewrite"
    start += ["--decoder.max_length=12", "--decoder.beams=2", "--data.vocab_size=300"] if small and fresh else []
    start += ["--decoder.max_length=12", "--decoder.beams=2", "--init_from", pretrained] if small and not fresh else []
    start = start or ["--init_from", pretrained]
    status, output = call("finetune", path.stem, *words, "--workdir", tmp_path / "run", *start, *QUICK)
    assert status == 0
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.toml", "head.json", "metrics.jsonl", "results.json", "tokenizer.json", "checkpoints"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    config, results = load(FinetuneConfig, tmp_path / "run" / "config.toml"), results_of(tmp_path / "run")
    assert {"task", "metric", "score", "scores", "metrics", "step", "failed"} <= results.keys()
    assert (results["task"], results["step"]) == (config.task, 3)
    assert results["scores"] == [results["score"]] == [results["metrics"][results["metric"]]]
    assert isinstance(results["failed"], list)
    score = re.search(r"Score: (.+?)(\.|;| on )", header(path))
    assert results["metric"] == (SCORES[score[1]] if score else "accuracy")
    assert f"{results['metric']} {results['score']:.4f}" in output
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "eval_loss" in line][-1] == 3
    assert [file.parent.name for file in (tmp_path / "run").glob("checkpoints/*/checksums.json")] == ["3"]
    head = json.loads((tmp_path / "run" / "head.json").read_text())
    spans = {"chunk": ("NP", "VP"), "conll2003": ("LOC", "PER"), "wnut17": ("location", "person")}.get(path.stem, ())
    expected = {
        "classify": sorted(GLUE[path.stem].classes) if path.stem in GLUE else ["no", "yes"],
        "tag": sorted(["O", *(f"{place}-{kind}" for place in "BIES" for kind in spans)]) if spans else ["NOUN", "VERB"],
        "answer": [],
        "rewrite": [],
    }  # fmt: skip
    assert head["classes"] == expected[config.task]
