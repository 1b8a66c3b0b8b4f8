import dataclasses
import importlib.util

import numpy as np
import pytest

from electrax.config import UserError
from electrax.convert.export import load_exported
from electrax.convert.onnx import export_onnx
from electrax.inference.tagger import Tagger
from tests.convert.tiny_models import SHAPES, assert_same, expected, make_model, make_rows, make_tokenizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

MODERN = {"body": "modern", "qk_norm": True}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rtd", {}),
        ("rtd", MODERN),
        ("mlm", {"embedding_width": 32}),
        ("mlm", MODERN),
        ("classes", {}),
        ("number", {}),
        ("choice", {}),
        ("template", {}),
        ("plain", {}),
        ("joint", {}),
        ("joint", MODERN),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("body", "electra"),
)
def test_onnx_runtime_gives_the_models_own_outputs_for_any_shape(kind, changes, tokenizer, tmp_path):
    model = make_model(kind, tokenizer, **changes)
    found = load_exported(export_onnx(model, tmp_path / "out"))
    for shape in SHAPES:
        ids = make_rows(tokenizer, *shape)
        assert_same(found(ids), expected(model, ids), atol=1e-4)


@pytest.fixture(scope="module")
def tagger(tokenizer):
    return make_model("tags", tokenizer)


@pytest.fixture(scope="module")
def exported(tagger, tmp_path_factory):
    return export_onnx(tagger, tmp_path_factory.mktemp("exported") / "tagger")


def test_the_axes_are_dynamic_and_the_ids_64_bit(exported):
    graph = onnx.load(exported / "model.onnx").graph

    def described(values):
        shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        return shapes, [onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in values]

    assert described(graph.input) == ({"ids": ["batch", "length"]}, ["INT64"])
    assert described(graph.output) == ({"logits": ["batch", "length", 4]}, ["FLOAT"])
    about = load_exported(exported).about
    assert about["inputs"] == {"ids": {"dtype": "int64", "shape": ["batch", "length"]}}
    assert about["outputs"] == {"logits": {"dtype": "float32", "shape": ["batch", "length", 4]}}


@pytest.mark.parametrize("body", ["electra", "modern"])
def test_a_row_that_is_too_long_or_an_unknown_id_fails_in_the_runtime_too(body, tokenizer, tmp_path):
    model = make_model("classes", tokenizer, body=body, max_length=32)
    out = export_onnx(model, tmp_path / "out")
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"ids": np.full((1, 24), 5)})[0].shape == (1, 3)
    for ids in (np.full((1, 25), 5), np.full((1, 24), tokenizer.vocab_size)):
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            session.run(None, {"ids": ids})


def test_the_types_of_a_pretrained_model_are_an_input(tokenizer, tmp_path):
    model = make_model("rtd", tokenizer)
    found, ids = load_exported(export_onnx(model, tmp_path / "out")), make_rows(tokenizer, 2, 9)
    # type 1 everywhere is type 0 with the two rows of the table exchanged
    table = model.params["embeddings"]["type"]
    model.params["embeddings"] = model.params["embeddings"] | {"type": table[::-1]}
    assert_same(found(ids, np.ones_like(ids)), expected(model, ids), atol=1e-4)


def test_a_tagger_trained_with_type_1_keeps_it(tagger, tokenizer, tmp_path):
    faithful = Tagger(tagger.params, tokenizer, dataclasses.replace(tagger.task, faithful=True), tagger.max_length)
    found, ids = load_exported(export_onnx(faithful, tmp_path / "out")), make_rows(tokenizer, 2, 9)
    wanted = expected(faithful, ids)
    assert np.abs(wanted["logits"] - expected(tagger, ids)["logits"]).max() > 0.1
    assert_same(found(ids), wanted, atol=1e-4)


def test_eight_bits_make_a_smaller_file_that_says_nearly_the_same(tokenizer, tmp_path):
    model = make_model("tags", tokenizer, width=64, feed_forward=256)
    small = load_exported(export_onnx(model, tmp_path / "small", int8=True))
    export_onnx(model, tmp_path / "whole")
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("whole", "small")]
    assert sizes[1] < 0.5 * sizes[0]
    ids = make_rows(tokenizer, 16, 24)
    at = ids != tokenizer.pad_id
    found, wanted = small(ids)["logits"][at], expected(model, ids)["logits"][at]
    assert 1e-3 < np.abs(found - wanted).max() < 0.2 < 0.2 * np.std(wanted)  # it is quantised, and by 8 bits
    assert np.mean(np.argmax(found, -1) == np.argmax(wanted, -1)) > 0.9


def test_a_missing_library_is_named(tagger, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(UserError, match="format onnx needs other libraries: pip install onnx, or uv run --extra onnx"):
        export_onnx(tagger, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
