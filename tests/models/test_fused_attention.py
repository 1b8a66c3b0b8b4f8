import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.attention import SelfAttention, dot_product_attention
from electrax.models.fused_attention import fits, fused_attention
from electrax.models.masks import document_mask, one_way_mask, padding_mask

B, H, K = 2, 3, 16
SEEDS = jnp.array([3, 4], jnp.uint32)


def mask_of(kind, length):
    documents = jnp.cumsum(jnp.arange(length)[None] % jnp.array([[7], [11]]) == 0, axis=1)
    padded = padding_mask(jnp.arange(length)[None] < jnp.array([[length], [length - 5]]))
    return {"padded": padded, "documents": document_mask(documents), "one way": one_way_mask(padded)}[kind]


def plain_attention(qkv, mask, seed, rate):
    return dot_product_attention(*(qkv[:, :, :, i] for i in range(3)), mask, seed=seed, dropout_rate=rate)


@functools.partial(jax.jit, static_argnums=(0, 3))
def value_and_gradient(attention, qkv, mask, rate):
    weights = jax.random.normal(jax.random.key(1), (*qkv.shape[:3], K))

    def weighed(qkv):
        out = attention(qkv, mask, SEEDS, rate)
        return jnp.sum(out * weights), out

    return jax.grad(weighed, has_aux=True)(qkv)


@pytest.mark.parametrize(
    ("length", "kind", "rate"),
    [(32, "padded", 0.1), (48, "documents", 0.3), (48, "one way", 0.0), (256, "padded", 0.1)],
    ids=["one block", "three blocks of documents", "three blocks one way", "two blocks"],
)
def test_it_is_plain_attention_with_its_gradient_and_the_same_weights_dropped(length, kind, rate):
    qkv, mask = 2 * jax.random.normal(jax.random.key(0), (B, length, H, 3, K)), mask_of(kind, length)
    fused = value_and_gradient(fused_attention, qkv, mask, rate)
    plain = value_and_gradient(plain_attention, qkv, mask, rate)
    for a, b in zip(fused, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_masked_key_has_weight_exactly_zero():
    qkv, mask = jax.random.normal(jax.random.key(0), (B, 32, H, 3, K)), mask_of("padded", 32)
    other = qkv.at[1, 27:, :, 1].set(1e4).at[1, 27:, :, 2].set(1e30)
    before, after = (fused_attention(each, mask, SEEDS, 0.1)[1, :27] for each in (qkv, other))
    assert (before == after).all()


def test_a_query_that_sees_nothing_gives_finite_values_and_gradients():
    qkv = jax.random.normal(jax.random.key(0), (B, 32, H, 3, K))
    for found in value_and_gradient(fused_attention, qkv, jnp.zeros((B, 1, 1, 32), bool), 0.1):
        assert jnp.isfinite(found).all()


def test_it_takes_lengths_of_whole_tiles_and_heads_of_a_power_of_two():
    assert fits(128, 64) and fits(48, 16)
    assert not fits(44, 64) and not fits(128, 8) and not fits(128, 48)


@pytest.mark.parametrize("length", [32, 20], ids=["fused", "too short for it"])
@pytest.mark.parametrize("options", [{}, {"rotary": True, "qk_norm": True}], ids=["as it is", "rotated and normalised"])
def test_self_attention_is_the_same_by_it_and_falls_back_where_it_does_not_fit(options, length):
    x, mask = jax.random.normal(jax.random.key(2), (B, length, H * K)), mask_of("padded", length)
    positions = jnp.tile(jnp.arange(length), (B, 1))
    plain, fused = (SelfAttention(H, dropout_rate=0.2, implementation=each, **options) for each in ("plain", "fused"))
    variables = jax.jit(fused.init)(jax.random.key(3), x, mask, positions)
    found = [
        jax.jit(lambda module=module: module.apply(variables, x, mask, positions, SEEDS)[0])()
        for module in (plain, fused)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_self_attention_without_a_seed_does_not_need_the_kernel(monkeypatch):
    monkeypatch.setattr("electrax.models.fused_attention.fused_attention", None)
    x, mask, positions = jnp.ones((B, 32, H * K)), mask_of("padded", 32), jnp.tile(jnp.arange(32), (B, 1))
    module = SelfAttention(H, implementation="fused")
    variables = module.init(jax.random.key(3), x, mask, positions)
    assert module.apply(variables, x, mask, positions)[0].shape == x.shape
    with pytest.raises(TypeError):
        module.apply(variables, x, mask, positions, SEEDS)
