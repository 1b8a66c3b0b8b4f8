"""Hugging Face directories that do not say what their tensors are: one line, and nothing is written."""

import json
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import electrax
from electrax.config import UserError
from electrax.convert import huggingface
from electrax.convert.model import Head, Model
from electrax.convert.safetensors import write_safetensors
from electrax.convert.weights import read_weights
from electrax.experiment.foreign import ConvertConfig
from electrax.experiment.saved import convert
from tests.convert.tiny_models import make_classifier, make_pair, make_tokenizer

TOKENIZER = make_tokenizer()
CLASSES = Head("classify", "classes", "dense", ("bad", "fair", "good"))
DEEP = json.loads("[" * 60 + "]" * 60)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A pretrained pair, and a model for each head."""
    folder = tmp_path_factory.mktemp("good")
    models = {
        "pair": make_pair(TOKENIZER),
        "classes": make_classifier(TOKENIZER, CLASSES),
        "one": make_classifier(TOKENIZER, Head("classify", "labels", "dense", ("only",))),
        "choice": make_classifier(TOKENIZER, Head("classify", "choice", "dense")),
    }
    for name, model in models.items():
        huggingface.write(folder / name, model, TOKENIZER)
    return folder


def change(folder: pathlib.Path, file: str = "config.json", **values) -> None:
    """Keys of a JSON file; of the value ... the key is taken away."""
    content = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def assert_refused(message: str, source: pathlib.Path, **more) -> None:
    out = source.parent / "out"
    with pytest.raises(UserError, match=message) as error:
        convert(ConvertConfig(source=str(source), out=str(out), **more))
    assert "\n" not in str(error.value)
    assert not out.exists() and not list(source.parent.glob(".out*"))


# -- config.json -------------------------------------------------------------------------------------------------------

VOCABULARY = TOKENIZER.vocab_size
ENCODER = [
    ("a model of the family 'roberta'; expected electra or bert, or gpt2 alone", {"model_type": "roberta"}),
    (r"a model of the family \[\]; expected", {"model_type": []}),
    ("hidden_act is 'relu'; electrax has 'gelu'", {"hidden_act": "relu"}),
    (r"hidden_act is \[\[\[", {"hidden_act": DEEP}),
    (r"intermediate.dense.weight has the shape \[12, 8\].*intermediate_size 13", {"intermediate_size": 13}),
    (r"word_embeddings.weight has the shape.*vocab_size 9", {"vocab_size": 9}),
    ("hidden_size is 'big'; expected a number", {"hidden_size": "big"}),
    ("hidden_size is True; expected a number", {"hidden_size": True}),
    ("does not fit together: width 8 does not divide into 3 heads", {"num_attention_heads": 3}),
    ("tensors have no place in the model: electra.encoder.layer.1", {"num_hidden_layers": 1}),
    ("the tensor electra.encoder.layer.2.attention.self.query.weight is missing", {"num_hidden_layers": 3}),
    (r"num_hidden_layers is 1000000000; it has \d\d tensors", {"num_hidden_layers": 10**9}),
    ("hidden_dropout_prob is None; expected a number from 0 to below 1", {"hidden_dropout_prob": None}),
    ("hidden_dropout_prob is 'x'; expected", {"hidden_dropout_prob": "x"}),
    ("attention_probs_dropout_prob is nan; expected", {"attention_probs_dropout_prob": float("nan")}),
    ("hidden_dropout_prob is 1000.*000; expected", {"hidden_dropout_prob": 10**400}),
    ("architectures is 5; expected a list of names", {"architectures": 5}),
    (r"architectures is \[\{\}\]; expected a list of names", {"architectures": [{}]}),
]
HEADS = [
    ("classes", "num_labels is '3'; its output layer has 3 rows", {"id2label": ..., "num_labels": "3"}),
    ("classes", "num_labels is 1000000000; its output", {"id2label": ..., "num_labels": 10**9}),
    ("classes", "id2label must map the numbers from 0 on to names", {"id2label": ["bad", "fair", "good"]}),
    ("classes", "id2label must map", {"id2label": {"0": "bad", "1": "fair", "3": "good"}}),
    ("classes", "id2label must map", {"id2label": {"0": "bad", "1": "fair", "2": DEEP}}),
    ("classes", "id2label gives the name 'bad' to 2 classes", {"id2label": {"0": "bad", "1": "fair", "2": "bad"}}),
    ("classes", r"\[3, 8\], which does not fit its config's 2 outputs", {"id2label": {"0": "bad", "1": "fair"}}),
    ("classes", "problem_type is 'ranking'; expected regression or", {"problem_type": "ranking"}),
    ("choice", "summary_type is 'mean'; electrax has 'first' alone", {"summary_type": "mean"}),
    ("choice", "summary_activation is 'tanh'; electrax has 'gelu' alone", {"summary_activation": "tanh"}),
    ("choice", "summary_activation is None; electrax has 'gelu' alone", {"summary_activation": None}),
    ("choice", "summary_use_proj is False; electrax has True alone", {"summary_use_proj": False}),
]


@pytest.mark.parametrize("message, changes", ENCODER, ids=lambda value: value if isinstance(value, str) else "")
def test_a_shape_that_is_not_that_of_the_tensors_is_named_by_its_key(message, changes, good, tmp_path):
    shutil.copytree(good / "pair" / "discriminator", tmp_path / "bad")
    change(tmp_path / "bad", **changes)
    assert_refused(message, tmp_path / "bad")


@pytest.mark.parametrize("name, message, changes", HEADS)
def test_a_head_that_electrax_does_not_have_is_named_by_its_key(name, message, changes, good, tmp_path):
    shutil.copytree(good / name, tmp_path / "bad")
    change(tmp_path / "bad", **changes)
    assert_refused(message, tmp_path / "bad")


def head_of(folder: pathlib.Path, **changes) -> Head | None:
    change(folder, **changes)
    return huggingface.read(folder).head


def test_what_the_outputs_are_comes_from_the_config_as_far_as_it_says(good, tmp_path):
    folder = shutil.copytree(good / "classes", tmp_path / "classes")
    names = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert head_of(folder, id2label=..., problem_type=...) == Head("classify", "classes", "dense", names)
    folder = shutil.copytree(good / "one", tmp_path / "one")
    for problem, kind in (
        ("multi_label_classification", "labels"),
        ("single_label_classification", "classes"),
        ("regression", "number"),
        (None, "number"),
    ):
        head = head_of(folder, problem_type=problem)
        assert head == Head("classify", kind, "dense", () if kind == "number" else ("only",))
    change(folder, problem_type="multi_label_classification")
    (row,) = electrax.load(folder).predict(["the cat"])
    assert set(row["probabilities"]) == {"only"}


KEYS = sorted({*huggingface.config_of(make_pair(TOKENIZER).encoder, "ElectraModel", CLASSES, TOKENIZER), "num_labels"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("012"), inner, max_size=3),
    max_leaves=5,
)


@hypothesis.given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_of_any_config_comes_a_model_or_one_line(good, tmp_path_factory, changes):
    folder = shutil.copytree(good / "classes", tmp_path_factory.mktemp("fuzz") / "bad")
    change(folder, **changes)
    try:
        assert isinstance(huggingface.read(folder), Model)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_damaged_config_is_one_line(good, tmp_path):
    shutil.copytree(good / "pair" / "discriminator", tmp_path / "bad")
    for content, message in (
        (b"{", "config.json: not JSON"),
        (b"[]", "config.json: expected an object of JSON"),
        (b'{"model_type": "\xff"}', "config.json: not JSON"),
        (b'{"id2label": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "config.json: not JSON"),
    ):
        (tmp_path / "bad" / "config.json").write_bytes(content)
        assert_refused(message, tmp_path / "bad")


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_a_generator_of_full_width_whose_config_says_a_quarter_is_named_by_the_key(good, tmp_path):
    shutil.copytree(good / "pair", tmp_path / "bad")
    change(tmp_path / "bad" / "generator", hidden_size=1, num_attention_heads=1)
    assert_refused(r"generator: .*has the shape \[.*which does not fit its config's hidden_size 1", tmp_path / "bad")


@pytest.mark.parametrize("key, table", [("vocab_size", "word"), ("max_position_embeddings", "position")])
def test_a_generators_own_embeddings_of_another_size_are_named_by_their_key(key, table, good, tmp_path):
    shutil.copytree(good / "pair", tmp_path / "bad")
    folder = tmp_path / "bad" / "generator"
    tensors = dict(read_weights(folder))
    for name in tensors:
        if f"{table}_embeddings" in name or (key == "vocab_size" and name == "generator_lm_head.bias"):
            tensors[name] = np.array(tensors[name][:-1])
    write_safetensors(folder / "new", tensors)
    (folder / "new").rename(folder / "model.safetensors")
    before = json.loads((folder / "config.json").read_text())[key]
    change(folder, **{key: before - 1})
    assert_refused(
        f"its config's {key} is {before - 1}, the discriminator's {before}; expected the same", tmp_path / "bad"
    )


def test_a_generator_that_has_no_use_is_refused(good, tmp_path):
    shutil.copytree(good / "pair", tmp_path / "pair")
    generator = str(tmp_path / "pair" / "generator")
    assert_refused(
        "generator .*: has no use, as .*pair holds a generator already", tmp_path / "pair", generator=generator
    )
    assert_refused("heads 3: has no use, as .*pair is no TensorFlow checkpoint", tmp_path / "pair", heads=3)
    source = tmp_path / "pair" / "discriminator"
    with pytest.raises(UserError, match="^no/such..one: no such file or directory$"):
        convert(ConvertConfig(source=str(source), out=str(tmp_path / "out"), generator="no/such..one"))


# -- tokenizers and the rest -------------------------------------------------------------------------------------------


def test_a_tokenizer_with_another_number_of_tokens_is_refused(good, tmp_path):
    pieces = TOKENIZER.pieces(range(VOCABULARY))
    for tokens in (pieces[:-1], [*pieces, "more"]):
        shutil.copytree(good / "pair" / "discriminator", tmp_path / "bad")
        (tmp_path / "bad" / "tokenizer.json").unlink()
        (tmp_path / "bad" / "vocab.txt").write_text("\n".join(tokens) + "\n")
        assert_refused(f"its tokenizer has {len(tokens)} tokens, its word table {VOCABULARY} rows", tmp_path / "bad")
        shutil.rmtree(tmp_path / "bad")


def test_a_damaged_tokenizer_config_is_one_line(good, tmp_path):
    folder = shutil.copytree(good / "pair" / "discriminator", tmp_path / "bad")
    (folder / "tokenizer.json").unlink()
    assert_refused("expected one of tokenizer.json, tokenizer.model, vocab.txt in it", folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENIZER.pieces(range(VOCABULARY))) + "\n")
    for content, message in (
        ("[]", "tokenizer_config.json: expected an object of JSON"),
        ("{", "tokenizer_config.json: not JSON"),
        ('{"do_lower_case": "no"}', "tokenizer_config.json: do_lower_case is 'no'; expected true or false"),
        ('{"strip_accents": 1}', "tokenizer_config.json: strip_accents is 1; expected true or false"),
    ):
        (folder / "tokenizer_config.json").write_text(content)
        assert_refused(message, folder)


def test_a_directory_that_is_not_empty_is_left_alone_and_nothing_is_read_for_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="out: is there already; expected a new or empty directory"):
        convert(ConvertConfig(source=str(tmp_path / "absent"), out=str(tmp_path / "out")))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
