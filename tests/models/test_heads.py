import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.encoder import EncoderConfig
from electrax.models.heads import OutputHead
from tests.fixtures.weights import random_params

CONFIG = EncoderConfig(vocab_size=50, width=16, heads=2, dropout=0.25)


def apply(head, params, hidden, seed=None):
    return jax.jit(head.apply)({"params": params}, hidden, seed)


def fresh(head, width, draws=1):
    """Parameters as first drawn, `draws` times."""
    keys = jax.random.split(jax.random.key(0), draws)
    return jax.jit(jax.vmap(lambda key: head.init(key, jnp.ones((1, width)))))(keys)["params"]


@functools.cache
def drawn(style, outputs=3):
    head = OutputHead(CONFIG, outputs, style)
    return head, random_params(jax.eval_shape(lambda: head.init(jax.random.key(0), jnp.ones((1, 16))))["params"])


def hidden_of(*rows):
    return np.random.RandomState(1).standard_normal((*rows, 16)).astype(np.float32)


def expected(style, params, hidden):
    """In numpy, float64, with the GELU of the error function."""
    layers = jax.tree.map(np.float64, params)
    x = np.float64(hidden)
    if style == "dense":
        x = x @ layers["dense"]["kernel"] + layers["dense"]["bias"]
        x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x @ layers["output"]["kernel"] + layers["output"]["bias"]


@pytest.mark.parametrize("style", ["linear", "dense"])
@pytest.mark.parametrize("rows", [(5,), (2, 7)], ids=["texts", "words"])
def test_logits_are_those_of_numpy_for_texts_and_for_every_word(style, rows):
    head, params = drawn(style)
    logits = apply(head, params, hidden_of(*rows))
    assert logits.shape == (*rows, 3)
    np.testing.assert_allclose(logits, expected(style, params, hidden_of(*rows)), rtol=1e-4, atol=1e-5)


def test_a_linear_head_is_one_layer_and_a_dense_one_two_with_the_width_between():
    assert jax.tree.map(jnp.shape, drawn("linear")[1]) == {"output": {"kernel": (16, 3), "bias": (3,)}}
    assert jax.tree.map(jnp.shape, drawn("dense")[1]) == {
        "dense": {"kernel": (16, 16), "bias": (16,)},
        "output": {"kernel": (16, 3), "bias": (3,)},
    }


@pytest.mark.parametrize("style", ["linear", "dense"])
def test_logits_are_float32_also_of_bfloat16_hidden_states(style):
    head, params = drawn(style)
    half = dataclasses.replace(head, config=dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    logits = apply(half, params, jnp.asarray(hidden_of(5), jnp.bfloat16))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected(style, params, hidden_of(5)), atol=0.1)
    if style == "linear":  # then nothing but the hidden states is rounded
        rounded = np.asarray(jnp.asarray(hidden_of(5), jnp.bfloat16), np.float32)
        np.testing.assert_allclose(logits, expected(style, params, rounded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 2, 128])
def test_output_layers_start_uniform_within_the_limits_of_glorot_and_without_bias(outputs):
    layer = fresh(OutputHead(CONFIG, outputs), 256, draws=512 // outputs)["output"]
    values = np.asarray(layer["kernel"]).ravel()
    limit = math.sqrt(6 / (256 + outputs))
    assert np.abs(values).max() <= limit
    assert np.abs(values).max() > 0.999 * limit
    assert values.std() == pytest.approx(limit / math.sqrt(3), rel=0.01)
    assert not np.any(layer["bias"])


def test_the_layer_before_starts_as_the_encoders_layers_do():
    layer = fresh(OutputHead(dataclasses.replace(CONFIG, width=256), 2, "dense"), 256)["dense"]
    kernel = np.asarray(layer["kernel"])
    assert np.abs(kernel).max() <= 0.04 and kernel.std() == pytest.approx(0.0176, rel=0.02)
    assert not np.any(layer["bias"])


# -- dropout ----------------------------------------------------------------------------------------------------------


SEED = jnp.arange(400, dtype=jnp.uint32)


def test_a_quarter_of_the_hidden_units_is_dropped_and_the_rest_made_larger():
    """Seen through a layer that changes nothing."""
    unchanged = {"output": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}
    hidden = hidden_of(400)
    out = np.asarray(apply(OutputHead(CONFIG, 16), unchanged, hidden, SEED))
    assert np.mean(out == 0) == pytest.approx(0.25, abs=0.02)  # four standard deviations of 6400
    np.testing.assert_allclose(out[out != 0], hidden[out != 0] / 0.75, rtol=1e-5)


def test_a_dense_head_drops_before_both_layers():
    """Seen through a first layer that gives a large bias, which GELU leaves alone, and nothing of what it is given."""
    params = {
        "dense": {"kernel": jnp.zeros((16, 16)), "bias": jnp.full(16, 9.0)},
        "output": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)},
    }
    out = np.asarray(apply(OutputHead(CONFIG, 16, "dense"), params, hidden_of(400), SEED))
    assert np.mean(out == 0) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(out[out != 0], 12.0, rtol=1e-5)
    through = params | {"dense": {"kernel": jnp.eye(16), "bias": jnp.full(16, 9.0)}}
    first = np.asarray(apply(OutputHead(CONFIG, 16, "dense"), through, np.ones((400, 16), np.float32), SEED))
    # 1 dropped or 4/3, plus 9, and that dropped or times 4/3; the two draws have nothing to do with each other
    both = [np.mean(np.isclose(first, value)) for value in (0, 12, (4 / 3 + 9) * 4 / 3)]
    assert both == pytest.approx([0.25, 0.75 * 0.25, 0.75 * 0.75], abs=0.025)


def test_dropout_follows_the_rows_seed_and_is_off_without_one():
    head, params = drawn("dense")
    hidden = hidden_of(4)
    seed = jnp.array([7, 8, 7, 9], jnp.uint32)
    out = apply(head, params, hidden, seed)
    np.testing.assert_array_equal(apply(head, params, hidden[::-1], seed[::-1])[::-1], out)
    assert not np.allclose(out, apply(head, params, hidden), atol=1e-3)
    same = apply(head, params, np.tile(hidden[:1], (4, 1)), seed)
    assert (same[0] == same[2]).all() and (same[0] != same[1]).any()
