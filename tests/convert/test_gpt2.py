"""GPT-2 of Transformers as a causal LM, and as the generator of a discriminator."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import electrax
from electrax.config import UserError, build
from electrax.convert.weights import read_weights, write_safetensors
from electrax.experiment import pretrain
from electrax.experiment.config import PretrainConfig, read_config
from electrax.experiment.foreign import ConvertConfig
from electrax.experiment.saved import convert
from electrax.models.encoder import Embeddings
from electrax.models.generator import Generator
from electrax.models.masks import padding_mask
from tests.fixtures.finetuning import TEXT, call
from tests.fixtures.gpt2 import make_gpt2

PHRASES = ["the cat", " sat on  the mat.", "\nNo one, it's said, was there [MASK]!", "naïve 猫 x10"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Its folder, and its tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    return folder, make_gpt2(folder)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    status, _ = call("convert", theirs[0], out)
    report = json.loads((out / "conversion.json").read_text())
    assert status == 0 and len(report["used"]) == 2 * 12 + 4 and not report["left_out"]
    return out


def next_logits(model, ids):
    """[B, L, V]: the logits of what follows each token but the last."""
    config, table = model.generator, model.params["embeddings"]
    embedded = Embeddings(config).apply({"params": table}, jnp.asarray(ids))
    mask = padding_mask(jnp.ones(ids.shape, bool))
    logits = Generator(config, "causal").apply({"params": model.params["generator"]}, embedded, table["word"], mask)
    return np.asarray(logits)[:, 1:]


def test_logits_are_those_of_transformers_and_added_tokens_have_those_of_the_end_of_a_text(theirs, ours):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(theirs[0]).eval()
    size = theirs[1].get_vocab_size()
    ids = np.random.RandomState(0).randint(0, size, (3, 20))
    with torch.inference_mode():
        expected = model(torch.tensor(ids)).logits.numpy()[:, :-1]
    found = next_logits(electrax.load(ours), ids)
    np.testing.assert_allclose(found[..., :size], expected, atol=1e-4, rtol=0)
    end = np.repeat(expected[..., -1:], 5, axis=-1)
    np.testing.assert_allclose(found[..., size : size + 5], end, atol=1e-4, rtol=0)
    assert (found[..., size + 5 :] == np.finfo(np.float32).min).all()


def test_the_names_of_the_first_checkpoints_and_tied_or_constant_tensors_are_read(theirs, ours, tmp_path):
    tensors = read_weights(theirs[0])
    older = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    older |= {"lm_head.weight": older["wte.weight"], "h.0.attn.bias": np.tri(24, dtype=np.float32)[None, None]}
    write_safetensors(tmp_path / "model.safetensors", older)
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((theirs[0] / file).read_bytes())
    report = convert(ConvertConfig(source=str(tmp_path), out=str(tmp_path / "out")))
    assert report["left_out"] == {
        "h.0.attn.bias": "a constant, not a weight",
        "lm_head.weight": "the same as wte.weight",
    }
    again, before = electrax.load(tmp_path / "out").params, electrax.load(ours).params
    jax.tree.map(np.testing.assert_array_equal, again, before)


def test_text_is_encoded_as_before_and_the_special_tokens_stand_behind_the_vocabulary(theirs, ours):
    model, size = electrax.load(ours), theirs[1].get_vocab_size()
    special = model.tokenizer.special_ids
    assert special == {"pad": size, "unk": size + 1, "cls": size + 2, "sep": size + 3, "mask": size + 4}
    assert model.tokenizer.vocab_size == size + 5
    for text in PHRASES:
        ids = theirs[1].encode(text).ids
        assert model.tokenizer.encode(text)[0] == model.tokenizer.encode_batch([text])[0] == ids
        assert model.tokenizer.decode(ids) == text.removeprefix(" ")


def test_a_directory_of_gpt2_is_a_causal_lm_for_load_and_its_config_describes_it(theirs, ours):
    assert electrax.load(theirs[0]).reads_one_way
    config = read_config(ours)
    assert (config.objective.kind, config.generator.kind, config.model.body) == ("mlm", "causal", "gpt2")
    shape = config.model
    assert (shape.layers, shape.width, shape.heads, shape.feed_forward, shape.max_length) == (2, 16, 2, 24, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "its config's activation_function is 'relu'; electrax has 'gelu_new' alone"),
        ({"n_head": None}, "its config's n_head is None; expected a number above 0"),
        ({"n_head": 3}, "its config does not fit together: width 16 does not divide into 3 heads"),
        ({"n_inner": 32}, "has the shape [16, 24], which does not fit its config's n_inner 32"),
        ({"n_layer": 3}, "the tensor transformer.h.2.attn.c_attn.weight is missing"),
        ({"n_layer": 1}, "12 tensors have no place in the model"),
        ({"eos_token_id": 50256}, "its config's eos_token_id is 50256; expected a token's number"),
        ({"vocab_size": 320}, "its tokenizer has 300 tokens, its word table 320 rows"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_an_error_that_names_the_key(theirs, tmp_path, changes, message):
    for file in ("model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_bytes((theirs[0] / file).read_bytes())
    config = json.loads((theirs[0] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        convert(ConvertConfig(source=str(tmp_path), out=str(tmp_path / "out")))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


# -- as a generator ---------------------------------------------------------------------------------------------------


def config_with(source, folder, **changes):
    (folder / "text.txt").write_text("\n\n".join(TEXT.splitlines() * 4))
    values = {
        "workdir": str(folder / "run"),
        "steps": 1,
        "batch_size": 8,
        "model": {"size": "tiny", "layers": 1, "width": 32, "heads": 2, "embedding_width": 8, "max_length": 16},
        "generator": {"init_from": str(source)},
        "data": {"path": str(folder / "text.txt"), "tokenizer": str(source), "max_length": 16, "holdout": 0.2},
    }
    return build(PretrainConfig, {**values, **changes}, "the test")


@pytest.fixture(scope="module")
def run(ours, tmp_path_factory):
    return pretrain.set_up(config_with(ours, tmp_path_factory.mktemp("run")))


def test_gpt2_is_the_generator_of_a_discriminator_over_its_vocabulary(ours, run):
    before, params = electrax.load(ours).params, jax.device_get(run.state.params)
    assert (run.config.generator.kind, run.config.generator.body) == ("causal", "gpt2")
    assert set(params) == {"embeddings", "generator_embeddings", "generator", "discriminator"}
    size = run.tokenizer.vocab_size
    assert np.array_equal(params["generator_embeddings"]["word"][:size], before["embeddings"]["word"][:size])
    assert np.array_equal(params["generator_embeddings"]["position"], before["embeddings"]["position"][:16])
    jax.tree.map(np.testing.assert_array_equal, params["generator"]["encoder"], before["generator"]["encoder"])
    assert params["embeddings"]["word"].shape[1] == 8


def test_a_step_trains_it_and_the_directory_alone_describes_it(ours, run):
    list(run.train())
    run.checkpoints.close()
    folder = pathlib.Path(run.config.workdir).parent
    assert pretrain.set_up(config_with(ours, folder)).start == 1  # the same command again goes on
    model = electrax.load(run.config.workdir)
    assert (model.generator.body, model.generator.layers, model.discriminator.body) == ("gpt2", 2, "electra")
    assert len(model.detect("the cat")) == 2


def test_gpt2_itself_is_trained_on_from_its_weights(ours, tmp_path):
    shape = {"layers": 2, "width": 16, "heads": 2, "feed_forward": 24, "embedding_width": 16, "max_length": 24}
    made = pretrain.set_up(
        config_with(
            ours,
            tmp_path,
            init_from=str(ours),
            model={"size": "tiny", "body": "gpt2", **shape},
            generator={"kind": "causal"},
            objective={"kind": "mlm"},
        )
    )
    found, before, size = jax.device_get(made.state.params), electrax.load(ours).params, made.tokenizer.vocab_size
    assert set(found) == {"embeddings", "generator"}
    assert np.array_equal(found["embeddings"]["word"][:size], before["embeddings"]["word"][:size])
    jax.tree.map(np.testing.assert_array_equal, found["generator"]["encoder"], before["generator"]["encoder"])


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("generator", {"width": 8}, "its width is 16, this run's generator.width 8"),
        ("generator", {"kind": "two_tower"}, "its kind is causal, this run's generator.kind two_tower"),
        ("objective", {"kind": "mlm"}, 'objective.kind "mlm" has no discriminator beside it; expected init_from'),
        ("data", {"tokenizer": "wordpiece"}, "its vocabulary of 305 tokens is not the run's, of 120; expected a text"),
    ],
)
def test_what_does_not_fit_the_generators_weights_is_an_error(ours, tmp_path, section, changes, message):
    base = config_with(ours, tmp_path)
    values = {"generator": {"init_from": str(ours)}, "data": {**vars(base.data), "vocab_size": 120}, "objective": {}}
    values[section] = {**values[section], **changes}
    with pytest.raises(UserError) as caught:
        pretrain.set_up(config_with(ours, tmp_path, **values))
    assert str(caught.value).startswith(f"generator.init_from {ours}: {message}")
