"""The command `export` from its words to what it prints and leaves."""

import importlib.util
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import electrax
from electrax import cli
from electrax.convert.export import load_exported
from tests.fixtures.finetuning import REVIEWS, call, flat, make_pretrained, same_bits, write_rows

pytest.importorskip("safetensors")
needs_onnx = pytest.mark.skipif(
    not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime")), reason="onnx is missing"
)
TEXTS = ["the film was good", "a bad play with a poor story", "so it is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model, and classifiers of two seeds that start from it."""
    folder = tmp_path_factory.mktemp("export")
    write_rows(folder / "reviews.csv", REVIEWS)
    make_pretrained(folder / "pretrained")
    words = ["--data.path", folder / "reviews.csv", "--init_from", folder / "pretrained", "--workdir", folder / "seeds"]
    words += ["--seeds=2", "--steps=2", "--batch_size=8", "--data.max_length=16", "--data.shapes=1"]
    assert call("finetune", "csv", *words)[0] == 0
    return folder


def outputs(model):
    """Of every method of a model that takes texts."""
    if hasattr(model, "predict"):
        return {"logits": model.logits([(text,) for text in TEXTS])}
    probabilities = np.array([token.probability for token in model.detect(TEXTS[1])])
    return {"hidden": model.encode(TEXTS), "replaced": probabilities}


def main(monkeypatch, capsys, *words):
    """(exit status, standard output, standard error) of the program itself."""
    monkeypatch.setattr(sys, "argv", ["electrax", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


# -- a small directory for electrax -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrained", "seeds"])
def test_safetensors_are_a_small_directory_that_loads_as_the_same_model_bit_for_bit(name, folder, tmp_path):
    status, output = call("export", folder / name, tmp_path / "out", "--format", "safetensors")
    assert status == 0
    head = {"head.json"} if name == "seeds" else set()
    files = {"config.toml", "tokenizer.json", "model.safetensors"} | head
    assert {path.name for path in tmp_path.glob("out/*")} == files == set(re.findall(r"^file +(\S+),", output, re.M))
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    before, after = electrax.load(folder / name), electrax.load(tmp_path / "moved")
    assert same_bits(flat(before.params), flat(after.params))
    assert same_bits(outputs(before), outputs(after))


def test_of_several_seeds_the_best_one_goes_out(folder, tmp_path):
    call("export", folder / "seeds", tmp_path / "out", "--format", "safetensors")
    best = json.loads((folder / "seeds" / "results.json").read_text())["best"]
    other = {"seed-0": "seed-1", "seed-1": "seed-0"}[best]
    found = flat(electrax.load(tmp_path / "out").params)
    assert same_bits(found, flat(electrax.load(folder / "seeds" / best).params))
    assert not same_bits(found, flat(electrax.load(folder / "seeds" / other).params))


def test_with_bf16_every_weight_is_the_nearest_of_16_bits(folder, tmp_path):
    for name, more in (("whole", []), ("half", ["--bf16"])):
        call("export", folder / "pretrained", tmp_path / name, "--format", "safetensors", *more)
    whole, half = (flat(electrax.load(tmp_path / name).params) for name in ("whole", "half"))
    nearest = {name: np.asarray(jnp.asarray(leaf, jnp.bfloat16).astype(jnp.float32)) for name, leaf in whole.items()}
    assert same_bits(half, nearest) and not same_bits(half, whole)
    saved = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert saved[0] - saved[1] == pytest.approx(2 * sum(leaf.size for leaf in whole.values()), abs=200)


def test_the_small_directory_predicts_and_starts_a_training(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pretrained", "seeds"):
        call("export", folder / name, name, "--format", "safetensors")
    (tmp_path / "new.txt").write_text("\n".join(TEXTS))
    assert call("predict", "seeds", "new.txt") == call("predict", folder / "seeds", "new.txt")
    words = ["--data.path", folder / "reviews.csv", "--init_from", "pretrained", "--workdir", "run", "--steps=1"]
    assert call("finetune", "csv", *words, "--batch_size=8", "--data.max_length=16", "--data.shapes=1")[0] == 0


# -- for other programs -----------------------------------------------------------------------------------------------


def code_of(output):
    """The lines of Python that the command shows."""
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("to load it"))
    return "\n".join(line.removeprefix("to load it").strip() for line in lines[first:])


@pytest.mark.parametrize(
    ("name", "words", "atol"),
    [
        ("pretrained", [], 1e-6),
        ("seeds", [], 1e-6),
        pytest.param("pretrained", ["--format", "onnx"], 1e-4, marks=needs_onnx),
        pytest.param("seeds", ["--format", "onnx"], 1e-4, marks=needs_onnx),
    ],
)
def test_the_lines_that_the_command_prints_load_the_model_and_give_its_outputs(name, words, atol, folder, tmp_path):
    status, output = call("export", folder / name, tmp_path / "out", *words)
    assert status == 0
    model, exported = electrax.load(folder / name), load_exported(tmp_path / "out")
    rows = [[model.tokenizer.cls_id, *model.tokenizer.encode(text)[0], model.tokenizer.sep_id] for text in TEXTS]
    ids = np.full((3, max(map(len, rows))), model.tokenizer.pad_id, exported.about["inputs"]["ids"]["dtype"])
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    scope = {"ids": ids, "types": np.zeros_like(ids)}
    exec(code_of(output), scope)
    given = (
        scope["outputs"]
        if isinstance(scope["outputs"], dict)
        else dict(zip(exported.about["outputs"], scope["outputs"], strict=True))
    )
    assert list(given) and {key: value.shape for key, value in given.items()} == {
        key: value.shape for key, value in exported(ids).items()
    }
    wanted = outputs(model)
    key = "hidden" if name == "pretrained" else "logits"
    np.testing.assert_allclose(given[key], wanted[key], atol=atol, rtol=0)


@needs_onnx
def test_with_int8_the_products_with_weights_are_of_8_bits(folder, tmp_path):
    import onnx

    for name, more in (("whole", []), ("small", ["--int8"])):
        assert call("export", folder / "seeds", tmp_path / name, "--format", "onnx", *more)[0] == 0
    whole, small = (
        [node.op_type for node in onnx.load(tmp_path / name / "model.onnx").graph.node] for name in ("whole", "small")
    )
    # embeddings_project, query, key, value, attention output, up, down, head; beside them q kᵀ and its product with v
    assert (whole.count("MatMul"), whole.count("MatMulInteger")) == (10, 0)
    assert (small.count("MatMul"), small.count("MatMulInteger")) == (2, 8)


def test_the_command_says_what_is_where_and_what_goes_in_and_out(folder, tmp_path):
    output = call("export", folder / "seeds", tmp_path / "out")[1]
    assert re.search(rf"^to +{tmp_path}/out \(stablehlo\)$", output, re.M)
    size = (tmp_path / "out" / "model.stablehlo").stat().st_size
    assert f"model.stablehlo, {size / 1e3:.1f} kB" in output
    assert re.search(r"^input +ids: int32 \[batch, length\]$", output, re.M)
    assert re.search(r"^output +logits: float32 \[batch, 2\]$", output, re.M)
    assert re.search(r"^length +at most 16 tokens; padding is 0$", output, re.M)


def test_a_model_of_another_format_is_exported_too(folder, tmp_path):
    call("convert", folder / "pretrained", tmp_path / "theirs")
    status, _ = call("export", tmp_path / "theirs" / "discriminator", tmp_path / "out")
    assert status == 0
    ids = np.array([[2, 9, 10, 11, 3]])
    own = electrax.load(folder / "pretrained")
    np.testing.assert_allclose(
        load_exported(tmp_path / "out")(ids)["replaced"],
        jax.device_get(own._detect(own.params, ids.astype(np.int32), own.tokenizer.pad_id)),
        atol=1e-5,
        rtol=0,
    )


# -- errors and help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export", "export: expected MODEL OUT (a trained model, a new directory)"),
        ("export MODEL", "export: expected MODEL OUT"),
        ("export gone out", "gone: no such file or directory"),
        ("export MODEL full", "full: is there already; expected a new or empty directory"),
        ("export MODEL full --format safetensors", "full: is there already; expected a new or empty directory"),
        ("export MODEL full/notes.txt", "full/notes.txt: is there already"),
        ("export MODEL full/notes.txt/out --format safetensors", "full/notes.txt"),
        ("export MODEL out --int8", "int8 is for format onnx, not stablehlo"),
        ("export MODEL out --format onnx --bf16", "bf16 is for format safetensors, not onnx"),
        ("export MODEL out --format pickle", 'format is "pickle", but must be one of stablehlo, onnx, safetensors'),
        ("export MODEL out --fromat onnx", "unknown key fromat; did you mean format?"),
    ],
)
def test_wrong_input_is_one_line_and_status_2_and_nothing_is_left(
    folder, tmp_path, monkeypatch, capsys, command, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    words = [folder / "pretrained" if word == "MODEL" else word for word in command.split()]
    status, output, error = main(monkeypatch, capsys, *words)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("electrax: ") and message in error
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["full", "full/notes.txt"]


def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(folder, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else find(name, *more))
    status, _, error = main(monkeypatch, capsys, "export", folder / "pretrained", tmp_path / "out", "--format", "onnx")
    assert (status, error.count("\n")) == (2, 1)
    assert "pip install onnx, or uv run --extra onnx" in error
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_options_and_what_each_is_for():
    status, output = call("export", "--help")
    assert status == 0
    assert {"--format", "--int8", "--bf16"} <= set(re.findall(r"--[\w.]+", output))
    assert "{stablehlo,onnx,safetensors}" in output
