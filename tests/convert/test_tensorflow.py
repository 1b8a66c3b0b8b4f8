"""TensorFlow's checkpoints of ELECTRA and BERT, against the values TensorFlow was given and a model in numpy.

tests/fixtures/make_tensorflow.py wrote those of tests/fixtures/tensorflow, with TensorFlow.
"""

import math
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import electrax
from electrax.config import UserError
from electrax.convert.tensorflow import Checkpoint, is_checkpoint, read_checkpoint, towers
from electrax.experiment.foreign import ConvertConfig, as_workdir, read
from electrax.experiment.saved import convert
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings
from electrax.models.generator import Generator
from electrax.models.masks import padding_mask
from tests.convert.bundles import write
from tests.fixtures.make_tensorflow import bert, electra, value

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "tensorflow"
SHAPES = {"electra": dict(electra()), "untied": dict(electra(untied=True)), "bert": dict(bert())}
SLOTS = {
    "electra": {f"electra/embeddings/LayerNorm/{p}/adam_{s}" for p in ("beta", "gamma") for s in "mv"},
    "untied": set(),
    "bert": {f"bert/embeddings/LayerNorm/{p}/{s}" for p in ("beta", "gamma") for s in ("Adam", "Adam_1")},
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 40))]
IDS = np.array([[2, 5, 16, 27, 3, 38, 39, 3], [2, 13, 11, 3, 12, 3, 0, 0]], np.int32)
TYPES = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def copy(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint with a vocabulary, where it may be changed."""
    shutil.copytree(FIXTURES / name, folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_variable_is_what_tensorflow_was_given_and_slots_are_left_out(name):
    checkpoint = read_checkpoint(FIXTURES / name)
    assert checkpoint.variables.keys() == SHAPES[name].keys()
    for variable, shape in SHAPES[name].items():
        found, expected = checkpoint.variables[variable], value(variable, shape)
        assert found.dtype == np.float32 and np.array_equal(found, expected), variable
    slots = dict.fromkeys(SLOTS[name], "an optimizer slot")
    assert checkpoint.left_out == {**slots, "global_step": "the number of steps"}


def test_a_checkpoint_is_named_by_its_prefix_its_index_or_its_directory(tmp_path):
    folder = copy("electra", tmp_path / "electra")
    for path in (folder, folder / "model.ckpt-7", folder / "model.ckpt-7.index"):
        assert is_checkpoint(path) and len(read_checkpoint(path).variables) == len(SHAPES["electra"])
    for path in (tmp_path, tmp_path / "absent", folder / "checkpoint", folder / "model.ckpt"):
        assert not is_checkpoint(path)
    for other in ("config.toml", "config.json"):
        (folder / other).touch()
        assert not is_checkpoint(folder) and is_checkpoint(folder / "model.ckpt-7")
        (folder / other).unlink()


def test_of_several_checkpoints_the_one_that_is_named_or_else_the_last_is_read(tmp_path):
    for step in (9, 10, 8):
        write(tmp_path / f"model.ckpt-{step}", {f"step_{step}": np.zeros(1, np.float32)})
    assert set(read_checkpoint(tmp_path).variables) == {"step_10"}
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/on/another/machine/model.ckpt-8"\n')
    assert set(read_checkpoint(tmp_path).variables) == {"step_8"}
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-7"\n')
    assert set(read_checkpoint(tmp_path).variables) == {"step_10"}
    write(tmp_path / "other", {"other": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="holds 4 checkpoints; expected the prefix of one, as model.ckpt-10"):
        read_checkpoint(tmp_path)
    assert set(read_checkpoint(tmp_path / "other").variables) == {"other"}


def test_what_training_alone_needs_is_left_out(tmp_path):
    slots = ["a/bias/AdamWeightDecayOptimizer_1", "a/bias/LAMB", "beta1_power", "training/beta2_power_1"]
    others = {"loss_scale": "the loss's scale", "generator_predictions/temperature": "the temperature of sampling"}
    write(tmp_path / "model", dict.fromkeys([*slots, *others, "a/adam_mixer", "Adam"], np.zeros(1, np.float32)))
    checkpoint = read_checkpoint(tmp_path / "model")
    assert checkpoint.left_out == {**dict.fromkeys(slots, "an optimizer slot"), **others}
    assert set(checkpoint.variables) == {"a/adam_mixer", "Adam"}


# -- what becomes of it ------------------------------------------------------------------------------------------------


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Numpy:
    """The models of google-research/electra (model/modeling.py, run_pretraining.py) and BERT, from the variables that
    TensorFlow was given, in float64; one head of attention."""

    def __init__(self, shapes):
        self.shapes = shapes

    def get(self, name):
        return value(name, self.shapes[name]).astype(np.float64)

    def dense(self, x, name):
        return x @ self.get(f"{name}/kernel") + self.get(f"{name}/bias")

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * self.get(f"{name}/gamma") + self.get(f"{name}/beta")

    def hidden(self, embeddings, body):
        table = {kind: self.get(f"{embeddings}/embeddings/{kind}_embeddings") for kind in ("word", "token_type")}
        position = self.get(f"{embeddings}/embeddings/position_embeddings")[: IDS.shape[1]]
        x = self.norm(table["word"][IDS] + table["token_type"][TYPES] + position, f"{embeddings}/embeddings/LayerNorm")
        if f"{body}/embeddings_project/kernel" in self.shapes:
            x = self.dense(x, f"{body}/embeddings_project")
        for layer in (f"{body}/encoder/layer_{i}" for i in range(2)):
            q, k, v = (self.dense(x, f"{layer}/attention/self/{part}") for part in ("query", "key", "value"))
            scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]) - 1e4 * (IDS == 0)[:, None]
            attended = self.dense(softmax(scores) @ v, f"{layer}/attention/output/dense")
            x = self.norm(x + attended, f"{layer}/attention/output/LayerNorm")
            up = gelu(self.dense(x, f"{layer}/intermediate/dense"))
            x = self.norm(x + self.dense(up, f"{layer}/output/dense"), f"{layer}/output/LayerNorm")
        return x

    def replaced(self):
        hidden = gelu(self.dense(self.hidden("electra", "electra"), "discriminator_predictions/dense"))
        return self.dense(hidden, "discriminator_predictions/dense_1")[..., 0]

    def vocabulary(self, embeddings, body, head, transform):
        x = gelu(self.dense(self.hidden(embeddings, body), f"{transform}dense"))
        x = self.norm(x, f"{transform}LayerNorm")
        return x @ self.get(f"{embeddings}/embeddings/word_embeddings").T + self.get(f"{head}/output_bias")


def detect(model):
    embedded = Embeddings(model.discriminator).apply(
        {"params": model.params["embeddings"]}, jnp.asarray(IDS), jnp.asarray(TYPES)
    )
    parameters = {"params": model.params["discriminator"]}
    return Discriminator(model.discriminator).apply(parameters, embedded, padding_mask(jnp.asarray(IDS) != 0))


def fill(model):
    own = model.params.get("generator_embeddings", model.params["embeddings"])
    embedded = Embeddings(model.generator).apply({"params": own}, jnp.asarray(IDS), jnp.asarray(TYPES))
    parameters, mask = {"params": model.params["generator"]}, padding_mask(jnp.asarray(IDS) != 0)
    return Generator(model.generator).apply(parameters, embedded, own["word"], mask)[..., : len(VOCABULARY)]


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found)[IDS != 0], expected[IDS != 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["electra", "untied"])
def test_both_towers_of_electra_compute_what_its_variables_say(name, tmp_path):
    model, reference = electrax.load(copy(name, tmp_path / name)), Numpy(SHAPES[name])
    close(detect(model), reference.replaced())
    embeddings = "electra" if name == "electra" else "generator"
    predictions = "generator_predictions"
    close(fill(model), reference.vocabulary(embeddings, "generator", predictions, f"{predictions}/"))


def test_bert_computes_what_its_variables_say(tmp_path):
    model, reference = electrax.load(copy("bert", tmp_path / "bert")), Numpy(SHAPES["bert"])
    assert model.discriminator is None
    close(fill(model), reference.vocabulary("bert", "bert", "cls/predictions", "cls/predictions/transform/"))


def test_towers_share_the_arrays_of_their_embeddings():
    found, left_out = towers(read_checkpoint(FIXTURES / "electra"))
    word = "electra.embeddings.word_embeddings.weight"
    assert found["discriminator"][word] is found["generator"][word]
    assert left_out.keys() == {*SLOTS["electra"], "global_step"}


def without(*beginnings, name="electra"):
    return {k: value(k, s) for k, s in SHAPES[name].items() if not k.startswith(beginnings)}


def test_a_discriminator_without_its_generator_stays_alone_and_a_fine_tuned_ones_head_is_left_out():
    found, _ = towers(Checkpoint("c", without("generator"), {}))
    assert set(found) == {"discriminator"} and "discriminator_predictions.dense.weight" in found["discriminator"]
    heads = {"task_specific/sst/dense/kernel": np.zeros((24, 2)), "task_specific/sst/dense/bias": np.zeros(2)}
    found, left_out = towers(Checkpoint("c", {**without("generator", "discriminator_predictions"), **heads}, {}))
    assert set(found) == {"discriminator"} and left_out == dict.fromkeys(heads, "the head of a fine-tuned task")


def test_a_generator_that_has_the_discriminators_encoder_gets_it_and_a_masked_lm_is_a_generator_alone():
    head = {f"generator_predictions/{k}": np.zeros(s) for k, s in (("dense/kernel", (24, 8)), ("output_bias", 40))}
    found, left_out = towers(Checkpoint("c", {**without("generator"), **head}, {}))
    layer = "electra.encoder.layer.1.output.dense.weight"
    assert found["generator"][layer].base is found["discriminator"][layer].base and not left_out
    assert found["generator"]["generator_predictions.dense.weight"].shape == (8, 24)
    found, _ = towers(Checkpoint("c", {**without("generator", "discriminator_predictions"), **head}, {}))
    assert set(found) == {"generator"}


def test_a_variable_without_a_place_is_unknown_and_stops_the_conversion(tmp_path):
    odd = ["electra/encoder/layer_0/gate/kernel", "electra/encoder/layer_12345/output/dense/bias", "generator_bias"]
    variables = {**without(), **{name: np.zeros((1, 1), np.float32) for name in odd}}
    assert towers(Checkpoint("c", variables, {}))[1] == dict.fromkeys(odd, "unknown")
    write(tmp_path / "model", variables)
    with pytest.raises(UserError, match="model: 3 variables have no place in the model: electra/encoder/layer_0/gate"):
        read(tmp_path / "model", ConvertConfig())


def test_a_model_of_another_family_is_refused():
    albert = {
        "bert/embeddings/word_embeddings": np.zeros((40, 8)),
        "bert/embeddings/position_embeddings": np.zeros((16, 8)),
        "bert/encoder/transformer/group_0/inner_group_0/attention_1/self/key/kernel": np.zeros((8, 8)),
    }
    for variables, name in (
        (albert, "bert/encoder/layer_0/intermediate/dense/kernel is missing"),
        ({"model/wte": np.zeros((40, 8))}, "electra/embeddings/word_embeddings is missing"),
        ({"electra/embeddings/word_embeddings": np.zeros(40)}, "word_embeddings is not of two axes"),
        ({}, "electra/embeddings/word_embeddings is missing"),
    ):
        with pytest.raises(UserError, match=f"^c: .*{name}; expected the variables of Google's ELECTRA or BERT$"):
            towers(Checkpoint("c", variables, {}))


def test_convert_makes_a_work_directory_and_says_what_became_of_every_variable(tmp_path):
    source = copy("electra", tmp_path / "electra")
    report = convert(ConvertConfig(source=str(source / "model.ckpt-7"), out=str(tmp_path / "out")))
    assert report["left_out"] == {
        **dict.fromkeys(SLOTS["electra"], "an optimizer slot"),
        "global_step": "the number of steps",
    }
    shared = sum("/embeddings/" in name for name in SHAPES["electra"])
    assert len(report["used"]) == len(SHAPES["electra"]) + shared
    model = electrax.load(tmp_path / "out")
    assert (model.discriminator.width, model.generator.width, model.max_length) == (24, 16, 16)
    assert [token.piece for token in model.detect("w7 w39")] == ["w7", "w39"]


# -- what the variables do not say -------------------------------------------------------------------------------------


def heads_of(folder, **more):
    model, _ = read(folder, ConvertConfig(**more))
    return tuple(tower.heads for tower in (model.encoder, model.generator) if tower)


def test_the_number_of_heads_is_what_a_config_says_or_what_is_told_but_not_for_a_generator_of_its_own(tmp_path):
    folder, tower = copy("bert", tmp_path / "bert"), copy("electra", tmp_path / "electra")
    assert heads_of(folder) == (1,) and heads_of(folder, heads=2) == (2,)
    (folder / "bert_config.json").write_text('{"num_attention_heads": 4, "hidden_act": "gelu"}')
    assert heads_of(folder) == (4,) and heads_of(folder / "bert_model.ckpt-7", heads=2) == (2,)
    assert heads_of(tower, heads=3) == (3, 1)  # of 64 each, as google-research/electra makes every generator
    for said, message in (
        ('{"num_attention_heads": 5}', "width 16 does not divide into 5 heads"),
        ('{"num_attention_heads": "x"}', "num_attention_heads is 'x'; expected a number above 0"),
        ('{"hidden_act": "relu"}', "hidden_act is 'relu'; electrax has 'gelu' alone"),
        ("[", "bert_config.json: not JSON"),
    ):
        (folder / "bert_config.json").write_text(said)
        with pytest.raises(UserError, match=message):
            heads_of(folder)
    with pytest.raises(UserError, match="num_attention_heads is -1; expected a number above 0"):
        heads_of(tower, heads=-1)
    with pytest.raises(UserError, match="^generator other: has no use, as .*electra is a TensorFlow checkpoint$"):
        heads_of(tower, generator="other")


def test_a_cased_vocabulary_without_a_config_keeps_its_capitals(tmp_path):
    folder = copy("bert", tmp_path / "bert")
    cased = [piece.replace("w", "W") for piece in VOCABULARY]
    (folder / "vocab.txt").write_text("\n".join(cased) + "\n", encoding="utf-8")
    assert electrax.load(folder).tokenizer.encode_batch(["W7 w7"]) == [[7, 1]]
    assert read(folder, ConvertConfig(lowercase=True))[1].encode_batch(["W7 w7"]) == [[1, 1]]


def test_another_file_beside_a_checkpoint_is_no_change_of_it(tmp_path):
    folder = copy("electra", tmp_path / "electra")
    kept = as_workdir(folder / "model.ckpt-7")
    write(folder / "model.ckpt-70", {"other": np.zeros(1, np.float32)})
    (folder / "log.txt").touch()
    assert as_workdir(folder / "model.ckpt-7") == kept
    for name in ("bert_config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
        again = as_workdir(folder / "model.ckpt-7")
        assert again != kept
        kept = again
