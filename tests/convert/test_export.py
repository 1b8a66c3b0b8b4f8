import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from electrax.config import UserError
from electrax.convert.export import (
    ExportConfig,
    Exported,
    dimensions,
    export_stablehlo,
    graph_of,
    load_exported,
    outputs_of,
)
from electrax.data.tokenizer import Tokenizer
from electrax.inference.model import PretrainedModel
from tests.convert.tiny_models import (
    MAX_LENGTH,
    SHAPES,
    assert_same,
    expected,
    make_model,
    make_rows,
    make_tokenizer,
)

pytest.importorskip("safetensors")

MODERN = {"body": "modern", "qk_norm": True}
# the calls that a user of the files writes, where there is no electrax
FRESH = """
import pathlib, sys
sys.modules.update(dict.fromkeys(["electrax", "flax", "optax", "jaxtyping"]))  # importing these fails
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
program = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
weights = load_file("weights.safetensors")
for name in sys.argv[1:]:
    np.savez("found-" + name, **jax.jit(program.call)(weights, np.load(name)))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def classifier(tokenizer):
    return make_model("classes", tokenizer)


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory):
    return export_stablehlo(classifier, tmp_path_factory.mktemp("exported") / "classifier")


# -- stablehlo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rtd", {}),
        ("rtd", MODERN),
        ("mlm", {}),
        ("choice", {}),
        ("template", {}),
        ("tags", {}),
        ("plain", {}),
        ("joint", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("body", "electra"),
)
def test_an_exported_model_gives_the_models_own_outputs_for_any_shape(kind, changes, tokenizer, tmp_path):
    model = make_model(kind, tokenizer, **changes)
    found = load_exported(export_stablehlo(model, tmp_path / "out"))
    for shape in SHAPES:
        ids = make_rows(tokenizer, *shape)
        assert_same(found(ids), expected(model, ids), atol=1e-6, rtol=1e-6)


def test_a_fresh_process_runs_the_program_on_jax_numpy_and_safetensors_alone(exported, classifier, tokenizer):
    wanted = {}
    for rows, length in ((1, 8), (3, 13)):
        ids = make_rows(tokenizer, rows, length)
        np.save(exported / f"{rows}.npy", ids)
        wanted[f"{rows}.npy"] = expected(classifier, ids)["logits"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-I", "-c", textwrap.dedent(FRESH), *wanted]
    subprocess.run(command, cwd=exported, env=environment, check=True)
    for name, logits in wanted.items():
        with np.load(exported / f"found-{name}.npz") as found:
            np.testing.assert_allclose(found["logits"], logits, atol=1e-6, rtol=0)


def test_the_weights_are_beside_the_program_not_in_it(exported, classifier):
    from safetensors.numpy import load_file

    weights = load_file(exported / "weights.safetensors")
    kernel = classifier.params["discriminator"]["encoder"]["layer_1"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(weights["discriminator/encoder/layer_1/attention/qkv/kernel"], kernel)
    assert len(weights) == len(jax.tree.leaves(classifier.params))
    changed = {name: np.zeros_like(values) for name, values in weights.items()}
    program = jax.export.deserialize(bytearray((exported / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(program.call(changed, np.ones((2, 5), np.int32))["logits"], np.zeros((2, 3)))


def test_the_description_says_what_goes_in_and_what_comes_out(exported, tokenizer):
    about = json.loads((exported / "export.json").read_text())
    assert about["inputs"] == {"ids": {"dtype": "int32", "shape": ["batch", "length"]}}
    assert about["outputs"] == {"logits": {"dtype": "float32", "shape": ["batch", 3]}}
    assert (about["max_length"], about["vocab_size"]) == (MAX_LENGTH, tokenizer.vocab_size)
    assert about["special_ids"] == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert (about["task"], about["kind"], about["labels"]) == ("classify", "classes", ["bad", "fair", "good"])
    assert (about["format"], about["jax"]) == ("stablehlo", jax.__version__)
    assert Tokenizer.load(exported).sha256 == tokenizer.sha256


def test_electrics_discriminator_says_nothing_without_its_generator(tokenizer):
    model = make_model("rtd", tokenizer)
    electric = PretrainedModel(model.params, tokenizer, None, model.discriminator, MAX_LENGTH, detects=False)
    graph = graph_of(electric)
    assert {name: dimensions(spec) for name, spec in outputs_of(graph, MAX_LENGTH).items()} == {
        "hidden": ["batch", "length", 32]
    }
    assert list(graph.params["discriminator"]) == ["encoder"]


def test_eight_bits_are_for_onnx():
    with pytest.raises(UserError, match="int8 is for format onnx, not stablehlo"):
        ExportConfig("model", "out", int8=True)


def test_the_generator_stays_behind(tokenizer, tmp_path):
    from safetensors.numpy import load_file

    out = export_stablehlo(make_model("rtd", tokenizer), tmp_path / "out")
    assert {name.split("/")[0] for name in load_file(out / "weights.safetensors")} == {"embeddings", "discriminator"}


# -- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.ones(5, np.int32), r"ids: expected at least one row, as an array \[batch, length\], not \(5,\)"),
        (np.ones((0, 5), np.int32), r"ids: expected at least one row"),
        (np.ones((2, 5), np.float32), "ids: expected whole numbers, not float32"),
        (np.ones((2, 25), np.int32), "ids: rows of 25 tokens, but the model takes at most 24"),
        (np.full((2, 5), 80, np.int64), "ids: expected numbers from 0 to 79, found 80"),
        (np.full((2, 5), -1, np.int32), "ids: expected numbers from 0 to 79, found -1"),
    ],
)
def test_ids_that_the_model_cannot_take_are_an_error_before_the_call(ids, message, tokenizer):
    about = {"inputs": {"ids": {"dtype": "int32"}}, "max_length": 24, "vocab_size": 80}
    with pytest.raises(UserError, match=message):
        Exported(about, lambda ids: pytest.fail("was called"))(ids)


def test_types_are_checked_like_the_ids():
    about = {"inputs": {"ids": {"dtype": "int64"}}, "max_length": 24, "vocab_size": 80}
    ids, run = np.ones((2, 5), np.int32), lambda **inputs: inputs
    with pytest.raises(UserError, match="types: this model finds them"):
        Exported(about, run)(ids, ids)
    about["inputs"]["types"] = {"dtype": "int64"}
    with pytest.raises(UserError, match="types: expected numbers from 0 to 1, found 2"):
        Exported(about, run)(ids, 2 * ids)
    with pytest.raises(UserError, match=r"types: expected the shape of ids, \(2, 5\), not \(2, 4\)"):
        Exported(about, run)(ids, ids[:, 1:])
    given = Exported(about, run)(ids)
    assert given["types"].tolist() == [[0] * 5] * 2 and given["ids"].dtype == given["types"].dtype == np.int64


# -- files that are not as they should be -----------------------------------------------------------------------------


def test_an_export_never_overwrites_what_is_there(classifier, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_stablehlo(classifier, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_that_fails_leaves_nothing(classifier, tmp_path, monkeypatch):
    def full(directory):
        raise OSError(28, "No space left on device", "tokenizer.json")

    monkeypatch.setattr(classifier.tokenizer, "save", full)
    with pytest.raises(UserError, match="^tokenizer.json: No space left on device$"):
        export_stablehlo(classifier, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.stablehlo", "weights.safetensors"])
def test_a_file_with_a_flipped_bit_or_a_missing_one_is_named(name, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: missing, or not as it was written"):
        load_exported(tmp_path / "copy")
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: missing, or not as it was written"):
        load_exported(tmp_path / "copy")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": "pickle"}', '{"format": "onnx", "sha256": {}}', "\udcff"]
)
def test_another_description_is_an_error_of_one_line(text, tmp_path):
    (tmp_path / "export.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"export.json: not the description of an exported model, with [a-z0-9_, ]+$"):
        load_exported(tmp_path)


def test_a_folder_without_a_description_is_no_export(tmp_path):
    with pytest.raises(UserError, match="export.json: cannot be read"):
        load_exported(tmp_path)
