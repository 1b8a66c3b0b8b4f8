import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.attention import SelfAttention, dot_product_attention, rotate
from electrax.models.masks import document_mask, padding_mask

B, L, H, K = 2, 6, 2, 4
Q, KEYS, V = jax.random.normal(jax.random.key(0), (3, B, L, H, K)) * 2
SEEDS = jnp.array([3, 4], jnp.uint32)
MASKS = {
    "padded": padding_mask(jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)),
    "documents": document_mask(jnp.array([[1, 1, 2, 2, 2, 3], [1, 1, 1, 2, 0, 0]])),
}
attend = functools.partial(
    jax.jit(dot_product_attention, static_argnames=("implementation", "dropout_rate")), Q, KEYS, V
)


def reference(mask):
    """The reference's way, in numpy: scores scaled by 1/√K, -10000 added where masked."""
    q, k, v = (np.asarray(x, np.float64) for x in (Q, KEYS, V))
    out = np.zeros_like(v)
    for b, h in np.ndindex(B, H):
        scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(K) - 10_000.0 * ~np.asarray(mask)[b, 0]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h]
    return out


@pytest.mark.parametrize("mask", MASKS)
def test_plain_attention_is_the_references_with_minus_ten_thousand(mask):
    np.testing.assert_allclose(attend(MASKS[mask]), reference(MASKS[mask]), rtol=1e-5, atol=1e-6)


def test_a_gradient_of_odd_lengths_is_not_left_to_cudnn_which_has_none():
    first, mask = Q[:, :1], MASKS["padded"]
    call = functools.partial(dot_product_attention, first, KEYS, V, mask, seed=SEEDS, queries=L)
    assert (call(implementation="cudnn") == call(implementation="plain")).all()


@pytest.mark.parametrize("implementation", ["plain", "xla"])
def test_a_masked_key_has_weight_exactly_zero(implementation):
    call = jax.jit(dot_product_attention, static_argnames="implementation")
    before = call(Q, KEYS, V, MASKS["padded"], implementation=implementation)
    after = call(Q, KEYS.at[1, 4:].set(1e4), V.at[1, 4:].set(1e30), MASKS["padded"], implementation=implementation)
    assert (before == after).all()


@pytest.mark.parametrize("mask", MASKS)
def test_xla_attention_equals_plain_with_its_gradients(mask):
    weights = jax.random.normal(jax.random.key(1), (B, L, H, K))

    def value_and_grads(implementation):
        def weighed(q, k, v):
            out = dot_product_attention(q, k, v, MASKS[mask], implementation=implementation)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))(Q, KEYS, V)

    plain, xla = value_and_grads("plain"), value_and_grads("xla")
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(xla), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


ON_GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("implementation", ["xla", pytest.param("cudnn", marks=ON_GPU)])
def test_attention_of_a_library_is_plain_attention_in_bfloat16_with_its_gradients(implementation, kind):
    """At sizes that cuDNN takes, to within bfloat16's rounding."""
    length, own = 128, np.array([[1] * 50 + [2] * 40 + [3] * 38, [1] * 100 + [0] * 28])
    mask = padding_mask(jnp.asarray(own > 0)) if kind == "padded" else document_mask(jnp.asarray(own))
    q, k, v, weights = jax.random.normal(jax.random.key(2), (4, 2, length, 2, 64))
    weights = weights * (own > 0)[:, :, None, None]  # nobody reads what padding gives

    def value_and_grads(implementation):
        def weighed(q, k, v):
            out = dot_product_attention(q, k, v, mask, implementation=implementation, seed=SEEDS, dtype=jnp.bfloat16)
            return (out * weights).sum(), out * (weights != 0)

        return jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for one, other in zip(*map(jax.tree.leaves, map(value_and_grads, ("plain", implementation))), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=0.02 * np.abs(one).max())


@pytest.mark.parametrize("implementation", ["plain", "xla"])
def test_a_query_that_sees_nothing_gives_finite_values_and_gradients(implementation):
    mask = jnp.zeros((B, 1, 1, L), bool)

    def total(q, k, v):
        return dot_product_attention(q, k, v, mask, implementation=implementation).sum()

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(Q, KEYS, V)
    assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in grads)


def test_attention_dropout_takes_the_plain_path_whatever_the_implementation():
    plain = attend(MASKS["padded"], dropout_rate=0.5, seed=SEEDS)
    assert (attend(MASKS["padded"], implementation="xla", dropout_rate=0.5, seed=SEEDS) == plain).all()
    assert not np.allclose(plain, attend(MASKS["padded"]))


def test_dropped_attention_weights_are_zero_and_the_rest_is_scaled():
    """With values of one everywhere the output is the sum of the kept weights, times 2 at a rate of a half."""
    uniform = dot_product_attention(
        Q * 0, KEYS, jnp.ones_like(V), jnp.ones((B, 1, 1, L), bool), dropout_rate=0.5, seed=SEEDS
    )
    sixths = np.asarray(uniform)[..., 0] * L / 2
    np.testing.assert_allclose(sixths, np.round(sixths), atol=1e-5)
    assert len(np.unique(np.round(sixths))) > 2


# -- rotary positions -------------------------------------------------------------------------------------------------


def test_rotation_turns_pairs_of_halves_by_position_times_frequency():
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    # pairs (1, 3) and (2, 4), turned by 5 and by 5 · 10000^(-1/2) = 0.05
    a, b = 5.0, 0.05
    expected = [
        1 * np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        1 * np.sin(a) + 3 * np.cos(a),
        2 * np.sin(b) + 4 * np.cos(b),
    ]
    np.testing.assert_allclose(rotate(x, jnp.array([[5]])).ravel(), expected, rtol=1e-5)


def modules():
    module = SelfAttention(heads=2, rotary=True, use_bias=False)
    x = jax.random.normal(jax.random.key(2), (2, 6, 16))
    mask = jnp.ones((2, 1, 1, 6), bool)
    positions = jnp.tile(jnp.arange(6), (2, 1))
    return module, x, mask, positions, jax.jit(module.init)(jax.random.key(3), x, mask, positions)


def test_rotary_attention_depends_on_relative_positions_only():
    module, x, mask, positions, variables = modules()
    apply = jax.jit(lambda *inputs: module.apply(*inputs)[0])
    here = apply(variables, x, mask, positions)
    np.testing.assert_allclose(apply(variables, x, mask, positions + 100), here, atol=2e-5)
    assert not np.allclose(apply(variables, x, mask, positions * 2), here, atol=1e-3)


def test_attention_without_rotary_ignores_positions():
    _, x, mask, positions, variables = modules()
    attention = SelfAttention(heads=2, use_bias=False)
    apply = jax.jit(lambda *inputs: attention.apply(*inputs)[0])
    assert (apply(variables, x, mask, positions) == apply(variables, x, mask, positions * 2)).all()


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant():
    _, x, mask, positions, _ = modules()
    module = SelfAttention(heads=2, use_bias=False, qk_norm=True)
    variables = jax.jit(module.init)(jax.random.key(3), x, mask, positions)
    params = variables["params"]
    assert params["query_norm"]["scale"].shape == params["key_norm"]["scale"].shape == (8,)
    kernel = params["qkv"]["kernel"]
    louder = {"params": params | {"qkv": {"kernel": kernel.at[:, :, :2].multiply(50.0)}}}
    apply = jax.jit(lambda *inputs: module.apply(*inputs)[0])
    np.testing.assert_allclose(apply(louder, x, mask, positions), apply(variables, x, mask, positions), atol=1e-5)


def test_self_attention_divides_its_width_over_the_heads():
    """Against numpy, with kernel axes [D, H, 3, K] and [H, K, D]."""
    module = SelfAttention(heads=2)
    x = jax.random.normal(jax.random.key(2), (1, 3, 4))
    mask, positions = jnp.ones((1, 1, 1, 3), bool), jnp.arange(3)[None]
    variables = jax.jit(module.init)(jax.random.key(3), x, mask, positions)
    kernel, output = (np.asarray(variables["params"][name]["kernel"]) for name in ("qkv", "output"))
    expected = np.zeros((3, 4))
    for h in range(2):
        q, k, v = (np.asarray(x[0]) @ kernel[:, h, i] for i in range(3))
        weights = np.exp(q @ k.T / np.sqrt(2))
        expected += weights / weights.sum(-1, keepdims=True) @ v @ output[h]
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, x, mask, positions)[0][0], expected, rtol=1e-4, atol=1e-5
    )
