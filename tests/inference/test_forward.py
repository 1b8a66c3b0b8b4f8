import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.data.tokenizer import Tokenizer
from electrax.inference import forward
from electrax.inference.model import PretrainedModel
from electrax.models.encoder import EncoderConfig
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds

LINES = ["the cat sat on the mat", "a dog ran under the red mat"] * 20
ENCODER = EncoderConfig(vocab_size=60, layers=1, width=16, heads=2, feed_forward=32, embedding_width=8, max_length=16)


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer.train("wordpiece", LINES, 60)
    special = SpecialIds(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    task = PretrainTask(ObjectiveConfig(), ENCODER, ENCODER, special, "packed", True)
    params = jax.jit(lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 4), np.int32)}))()
    return PretrainedModel(params, tokenizer, ENCODER, ENCODER, 16)


@pytest.fixture(scope="module")
def ids(model):
    t = model.tokenizer
    rows = [[t.cls_id, *row, t.sep_id] for row in t.encode_batch(["the cat ran", "a red dog sat on the mat"])]
    return jnp.array([row + [t.pad_id] * (16 - len(row)) for row in rows])


def test_the_functions_give_what_the_model_gives(model, ids):
    texts, pad_id = ["the cat ran", "a red dog sat on the mat"], model.tokenizer.pad_id
    vectors = forward.pool(ENCODER, "discriminator", False, "mean", model.params, ids, pad_id)
    np.testing.assert_allclose(vectors, model.encode(texts, "mean"), atol=1e-5)
    logits = forward.detect(ENCODER, model.params, ids, pad_id)
    found = [token.probability for token in model.detect(texts[0])]
    np.testing.assert_allclose(jax.nn.sigmoid(logits[0, 1 : 1 + len(found)]), found, atol=1e-5)


@pytest.mark.parametrize(
    "function", [lambda params, ids: forward.encode(ENCODER, "discriminator", False, params, ids, 0).sum(axis=(1, 2)),
                 lambda params, ids: forward.detect(ENCODER, params, ids, 0).sum(axis=1)])  # fmt: skip
def test_gradients_and_maps_over_rows_pass_through_them(model, ids, function):
    weights = jnp.array([1.0, -2.0])
    whole = jax.grad(lambda params: weights @ function(params, ids))(model.params)
    each = jax.vmap(jax.grad(lambda params, row: function(params, row[None])[0]), in_axes=(None, 0))(model.params, ids)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(a, jnp.tensordot(weights, b, 1), atol=1e-4)
    assert float(jnp.abs(whole["embeddings"]["word"]).max()) > 0
