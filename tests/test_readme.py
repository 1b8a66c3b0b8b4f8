"""Every command and every Python example of the README runs, on a small text and a small model."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import pytest

from electrax.cli import run
from tests.fixtures.finetuning import write
from tests.fixtures.gpt2 import make_gpt2

README = pathlib.Path(__file__).parent.parent / "README.md"
# the README's runs at their own size would take hours; everything else of the command stays as it stands there
SHRINK = [
    "--steps=2",
    "--batch_size=8",
    "--model.layers=1",
    "--model.width=32",
    "--model.heads=2",
    "--model.embedding_width=32",
    "--model.max_length=128",
    "--generator.width=16",
    "--eval.rows=16",
]
TEXT = "\n\n".join(f"The cat number {i} sat on the mat and looked at the rain.\nIt rained all day." for i in range(60))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(line.split("&&")[-1]) for line in lines]
    return [line[min(line.index(name) for name in ("electrax", "pytest") if name in line) :] for line in words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("readme")
    (directory / "texts").mkdir()
    (directory / "texts" / "cats.txt").write_text(TEXT, encoding="utf-8")
    return directory


def test_set_up_commands_need_only_pip():
    lines = [line for block in blocks("sh") for line in block.splitlines() if "pip install" in line]
    assert lines == ["pip install uv && uv run electrax pretrain tiny", "pip install uv && uv run pytest"]


def table(*rows: tuple[str, ...], separator: str) -> str:
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def labelled(folder):
    """The files that the README's fine-tuning commands name."""
    reviews = [(f"a {'good' if i % 2 else 'dull'} film number {i}", "yes" if i % 2 else "no") for i in range(40)]
    (folder / "reviews.csv").write_text(table(("text", "label"), *reviews, separator=","))
    (folder / "new.txt").write_text("a good film\na dull film\n")
    pairs = [(f"is it {i}", f"it is {i}", str(i % 5)) for i in range(40)]
    (folder / "pairs.tsv").write_text(table(("question", "answer", "stars"), *pairs, separator="\t"))
    topics = [(f"film {i}", ("film", "film;new", "")[i % 3]) for i in range(40)]
    (folder / "topics.csv").write_text(table(("text", "topics"), *topics, separator=","))
    quiz = [(f"is it {i}", "yes", "no", str(i % 2)) for i in range(40)]
    (folder / "quiz.csv").write_text(table(("question", "first", "second", "right"), *quiz, separator=","))
    tagged = [{"words": ["Ann", "saw", f"Tom{i}"], "tags": ["B-PER", "O", "B-PER"]} for i in range(40)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    faq = [(f"when {i}", f"it opens at {i} sharp", f"at {i}") for i in range(40)]
    (folder / "faq.csv").write_text(table(("question", "context", "answer"), *faq, separator=","))
    for split in ("train", "val", "test"):
        for ending, word in (("en", "cat"), ("de", "Katze")):
            write(folder / "captions" / f"{split}.{ending}", "".join(f"{word} {i}\n" for i in range(20)))
    for split in ("train", "valid"):
        rows = [{"source": f"the cat sat {i}", "target": f"cat {i}"} for i in range(20)]
        write(folder / "articles" / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name, header, rows in (
        ("CoLA", (), [("a", str(i % 2), "*", f"the cat sat {i}") for i in range(20)]),
        (
            "RTE",
            ("index", "sentence1", "sentence2", "label"),
            [(str(i), "it rains", f"it pours {i}", "entailment" if i % 2 else "not_entailment") for i in range(20)],
        ),
    ):
        (folder / "glue" / name).mkdir(parents=True)
        for split in ("train", "dev"):
            text = table(*([header] if header else []), *rows, separator="\t")
            (folder / "glue" / name / f"{split}.tsv").write_text(text)


def options(name: str, arguments: list[str]) -> list[str]:
    """What makes a command of the README small."""
    if name == "pretrain" and "--help" not in arguments:
        sizes = [] if "data/mine" in arguments else ["--data.vocab_size=120", "--data.max_length=32"]
        return [*SHRINK, *sizes]
    if name == "finetune":
        if arguments[0] == "glue":
            return ["--epochs=1", "--batch_size=8", "--seeds=2"]
        if arguments[0] == "multi30k_en_de":
            sizes = ["--data.vocab_size=300", "--decoder.max_length=16", "--decoder.beams=3"]
            return [*sizes, "--steps=2", "--batch_size=8", "--model.layers=1", "--model.width=32", "--data.shapes=1"]
        if arguments[0] == "headlines":
            return ["--steps=2", "--batch_size=8", "--decoder.max_length=8", "--data.max_length=32", "--data.shapes=1"]
        sizes = [] if "--init_from" in arguments else ["--model.layers=1", "--model.width=32", "--model.heads=2"]
        seeds = ["--seeds=2"] if "--seeds" in arguments else []
        sizes += ["--data.max_query=8", "--data.doc_stride=8"] if "answer" in arguments else []
        return ["--steps=2", "--batch_size=8", "--data.max_length=32", "--data.shapes=1", *sizes, *seeds]
    return ["--vocab_size=120"] if name == "prepare" else []


def launch_together(folder) -> list[int]:
    """The exit statuses of the two commands for two terminals, at a port of their own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    lines = [line for block in blocks("console") for line in block.splitlines() if "--coordinator" in line]
    started = []
    for line in lines:
        words = shlex.split(line.replace("localhost:6666", f"localhost:{port}"))[3:]
        command = [sys.executable, "-m", "electrax", *words, *options(words[0], words)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        started.append(subprocess.Popen(command, cwd=folder, env=environment))
    return [process.wait(timeout=300) for process in started]


def test_commands_run_in_their_order_and_the_python_examples_on_what_they_leave(folder, labelled, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ran = []
    has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
    has_scores = all(importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score"))
    for name, *arguments in commands():
        if name == "pytest":
            continue
        if {"multi30k_en_de", "headlines", "runs/translator"} & set(arguments) and not has_scores:
            continue
        assert name == "electrax"
        command, *rest = arguments
        if command == "export" and not has_onnx:
            continue
        if any(word.startswith("--beam") for word in rest) and importlib.util.find_spec("apache_beam") is None:
            continue
        if "--dry_run" in rest:
            assert run([command, *rest, *SHRINK]) == 0
            continue
        assert run([command, *rest, *options(command, rest)]) == 0
        ran.append(command)
    assert ran.count("finetune") == (14 if has_scores else 12)
    assert {"pretrain", "evaluate", "prepare", "predict", "generate", "score", "augment"} <= set(ran)
    for file in ("config.toml", "metrics.jsonl", "results.json", "tokenizer.json", "checkpoints/2"):
        assert (folder / "runs" / "mine" / file).exists()
    out = capsys.readouterr().out
    assert "held-out rows after step 2" in out
    assert "accuracy of 2 seeds" in out
    for name, kind in (("topics", "labels"), ("quiz", "choice")):
        assert json.loads((folder / "runs" / name / "head.json").read_text())["kind"] == kind

    make_gpt2(folder / "hub" / "gpt2")  # in the place of the one that the README fetches
    assert run(["convert", "hub/gpt2", "runs/gpt2"]) == 0
    for launched in re.findall(r"electrax (pretrain [^\"\n]*)", "".join(blocks("console"))):
        on_disk = launched.replace("gs://my-bucket/mine", "data/mine").replace("gs://my-bucket/many", "runs/many")
        command, *rest = shlex.split(on_disk)
        if "--coordinator" not in rest:
            assert run([command, *rest, *options(command, rest)]) == 0
    assert launch_together(folder) == [0, 0]

    examples = blocks("python")
    assert len(examples) == 7
    scope: dict = {}
    for example in examples if has_onnx else examples[:-1]:
        exec(compile(example, str(README), "exec"), scope)
    assert scope["hidden"].shape[0] == 2
    assert scope["logits"].shape == (1, 6)
    assert float(abs(scope["gradient"]["embeddings"]["word"]).max()) > 0
    assert (scope["record"].step, scope["record"].kind) == (20, "save")
    assert {"yes", "no"} == set(scope["row"]["probabilities"])
    if has_onnx:
        label = scope["about"]["labels"][scope["scores"][0].argmax()]
        assert label == scope["classifier"].predict(["A wonderful film."])[0]["label"]
