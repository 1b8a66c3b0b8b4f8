import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.discriminator import Discriminator, ReplacedTokenHead
from electrax.models.encoder import EncoderConfig
from tests.fixtures.weights import random_params

TINY = EncoderConfig(
    vocab_size=50, layers=1, width=32, heads=2, feed_forward=16, embedding_width=32, max_length=16, dropout=0.0
)
HIDDEN = jnp.asarray(np.random.RandomState(0).randn(2, 3, 32), jnp.float32)


def test_the_head_is_dense_gelu_and_one_output():
    head = ReplacedTokenHead(TINY)
    params = random_params(jax.eval_shape(head.init, jax.random.key(0), HIDDEN)["params"])
    dense, output = (jax.tree.map(np.asarray, params[name]) for name in ("dense", "output"))
    x = np.asarray(HIDDEN, np.float64) @ dense["kernel"] + dense["bias"]
    x = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)
    expected = (x @ output["kernel"])[..., 0] + output["bias"]
    np.testing.assert_allclose(jax.jit(head.apply)({"params": params}, HIDDEN), expected, rtol=1e-4, atol=1e-5)


def test_the_first_layer_starts_as_the_kernels_and_the_output_glorot_uniform():
    params = jax.jit(ReplacedTokenHead(TINY).init)(jax.random.key(0), HIDDEN)["params"]
    dense, output = np.asarray(params["dense"]["kernel"]), np.asarray(params["output"]["kernel"])
    assert dense.std() == pytest.approx(0.0176, rel=0.1) and 0.038 < np.abs(dense).max() <= 0.04
    bound = math.sqrt(6 / (32 + 1))  # 0.43
    assert output.shape == (32, 1) and 0.8 * bound < np.abs(output).max() <= bound
    assert output.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    assert not params["dense"]["bias"].any() and not params["output"]["bias"].any()


def test_logits_are_float32_in_bfloat16_and_the_output_layer_computes_in_float32():
    half = dataclasses.replace(TINY, compute_dtype="bfloat16")
    mask = jnp.ones((2, 1, 1, 3), bool)
    params = random_params(jax.eval_shape(Discriminator(TINY).init, jax.random.key(0), HIDDEN, mask))
    full_logits = jax.jit(Discriminator(TINY).apply)(params, HIDDEN, mask)
    half_logits = jax.jit(Discriminator(half).apply)(params, HIDDEN, mask)
    assert half_logits.dtype == jnp.float32
    assert np.abs(half_logits - full_logits).max() < 0.05 * np.abs(full_logits).max()
    assert (half_logits != half_logits.astype(jnp.bfloat16).astype(jnp.float32)).any()
