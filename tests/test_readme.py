"""Every command and every Python example of the README runs, on a small text and a small model."""

import pathlib
import re
import shlex

import pytest

from electrax.cli import run

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
]
TEXT = "\n\n".join(f"The cat number {i} sat on the mat and looked at the rain.\nIt rained all day." for i in range(60))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line.split("&&")[-1])[2:] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("readme")
    (directory / "texts").mkdir()
    (directory / "texts" / "cats.txt").write_text(TEXT, encoding="utf-8")
    return directory


def test_set_up_commands_need_only_pip():
    lines = [line for block in blocks("sh") for line in block.splitlines() if "pip install" in line]
    assert lines == ["pip install uv && uv run electrax pretrain tiny", "pip install uv && uv run pytest"]


def test_commands_run_in_their_order_and_the_python_examples_on_what_they_leave(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ran = []
    for name, *arguments in commands():
        if name == "pytest":
            continue
        assert name == "electrax"
        trains = arguments[0] == "pretrain" and "--help" not in arguments
        sizes = ["--data.vocab_size=120", "--data.max_length=32"] if trains and "data/mine" not in arguments else []
        fewer = ["--vocab_size=120"] if arguments[0] == "prepare" else []
        assert run([*arguments, *(SHRINK if trains else []), *sizes, *fewer]) == 0
        ran.append(arguments[0])
    assert ran == ["pretrain", "pretrain", "pretrain", "evaluate", "prepare", "pretrain"]
    for file in ("config.toml", "metrics.jsonl", "results.json", "tokenizer.json", "checkpoints/2"):
        assert (folder / "runs" / "mine" / file).exists()
    assert "held-out rows after step 2" in capsys.readouterr().out

    examples = blocks("python")
    assert len(examples) == 2
    scope: dict = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), scope)
    assert scope["hidden"].shape[0] == 2
    assert scope["logits"].shape == (1, 6)
