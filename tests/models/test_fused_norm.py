import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.dropout import dropout
from electrax.models.fused_norm import NormOfSum, fits, norm_of_sum

SEEDS = jnp.array([3, 4], jnp.uint32)
EPSILON = 1e-3


def plain_norm(x, part, scale, bias, rate):
    norm = nn.LayerNorm(EPSILON, use_fast_variance=False)
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x + dropout(part, rate, SEEDS))


def fused_norm(x, part, scale, bias, rate):
    return norm_of_sum(x, part, scale, bias, SEEDS, rate, EPSILON)


@functools.partial(jax.jit, static_argnums=(0, 2))
def value_and_gradients(norm, inputs, rate):
    weights = jax.random.normal(jax.random.key(1), inputs[0].shape)

    def weighed(inputs):
        out = norm(*inputs, rate)
        return jnp.sum(out * weights), out

    return jax.grad(weighed, has_aux=True)(inputs)


@pytest.mark.parametrize(
    ("length", "width", "rate"),
    [(128, 16, 0.1), (16, 48, 0.5), (64, 768, 0.0)],
    ids=["two programs a row", "three parts of 16", "three parts of 256"],
)
def test_it_is_dropout_sum_and_layer_norm_with_their_gradients(length, width, rate):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, length, width), (2, length, width), (width,), (width,))
    inputs = tuple(3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    fused, plain = (value_and_gradients(norm, inputs, rate) for norm in (fused_norm, plain_norm))
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_it_takes_whole_tiles_only():
    assert fits(128, 768) and fits(16, 64)
    assert not fits(20, 64) and not fits(128, 40)


def test_its_parameters_are_those_of_a_layer_norm():
    x = jnp.ones((2, 16, 32))
    found = jax.eval_shape(NormOfSum(EPSILON, 0.1).init, jax.random.key(0), x, x, SEEDS)
    assert found == jax.eval_shape(nn.LayerNorm(EPSILON).init, jax.random.key(0), x)
