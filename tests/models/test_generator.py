import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.attention import KeyValues
from electrax.models.encoder import Encoder, EncoderConfig
from electrax.models.generator import Generator, MaskedLMHead
from electrax.models.masks import document_mask, padding_mask
from tests.fixtures.weights import random_params

TINY = EncoderConfig(
    vocab_size=50, layers=1, width=8, heads=2, feed_forward=16, embedding_width=12, max_length=16, dropout=0.0
)
RANDOM = np.random.RandomState(0)
HIDDEN = jnp.asarray(RANDOM.randn(2, 3, 8), jnp.float32)
WORD = jnp.asarray(RANDOM.randn(128, 12), jnp.float32)
LOWEST = np.finfo(np.float32).min


@functools.cache
def head_params(config=TINY):
    return random_params(jax.eval_shape(MaskedLMHead(config).init, jax.random.key(0), HIDDEN, WORD)["params"])


def test_the_head_is_dense_gelu_norm_and_the_word_table_with_a_bias():
    params = jax.tree.map(np.asarray, head_params())
    x = np.asarray(HIDDEN, np.float64) @ params["dense"]["kernel"] + params["dense"]["bias"]
    x = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * params["norm"]["scale"] + params["norm"]["bias"]
    expected = x @ np.asarray(WORD).T + params["output_bias"]
    found = jax.jit(MaskedLMHead(TINY).apply)({"params": head_params()}, HIDDEN, WORD)
    np.testing.assert_allclose(found[..., :50], expected[..., :50], rtol=1e-4, atol=1e-4)
    assert (found[..., 50:] == LOWEST).all()


def test_padded_entries_have_probability_zero_whatever_their_weights():
    params = head_params() | {"output_bias": head_params()["output_bias"].at[50:].set(1e6)}
    logits = jax.jit(MaskedLMHead(TINY).apply)({"params": params}, HIDDEN, WORD * 100)
    probabilities = jax.nn.softmax(logits)
    assert not probabilities[..., 50:].any() and jnp.argmax(logits, -1).max() < 50
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-5)


def test_padded_entries_get_no_gradient():
    def total(word, bias):
        params = head_params() | {"output_bias": bias}
        return jax.nn.log_softmax(MaskedLMHead(TINY).apply({"params": params}, HIDDEN, word))[..., 0].sum()

    word, bias = jax.jit(jax.grad(total, argnums=(0, 1)))(WORD, head_params()["output_bias"])
    assert not word[50:].any() and not bias[50:].any() and word[:50].all() and bias[:50].all()


@pytest.mark.parametrize("body", ["electra", "modern"])
def test_parameters_of_the_generator_have_no_word_table_of_their_own(body):
    config = dataclasses.replace(TINY, body=body)
    embedded, ids = jnp.zeros((1, 4, 12)), jnp.ones((1, 4), bool)
    shapes = jax.eval_shape(Generator(config).init, jax.random.key(0), embedded, WORD, padding_mask(ids))["params"]
    head = jax.tree.map(lambda leaf: leaf.shape, shapes["head"])
    norm = {"scale": (12,)} | ({"bias": (12,)} if body == "electra" else {})
    assert head == {"dense": {"kernel": (8, 12), "bias": (12,)}, "norm": norm, "output_bias": (128,)}
    assert set(shapes) == {"encoder", "head"}


def test_logits_at_slots_are_those_of_all_places():
    embedded = jnp.asarray(RANDOM.randn(2, 5, 12), jnp.float32)
    mask, slots = jnp.ones((2, 1, 1, 5), bool), jnp.array([[3, 0, 3], [1, 4, 0]])
    generator = Generator(TINY)
    params = random_params(jax.eval_shape(generator.init, jax.random.key(0), embedded, WORD, mask))
    everywhere = jax.jit(generator.apply)(params, embedded, WORD, mask)
    at_slots = jax.jit(generator.apply)(params, embedded, WORD, mask, slots)
    expected = np.stack([np.asarray(everywhere)[i, slots[i]] for i in range(2)])
    np.testing.assert_allclose(at_slots[..., :50], expected[..., :50], rtol=1e-4, atol=1e-4)


def test_logits_are_float32_in_bfloat16():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    full = jax.jit(MaskedLMHead(TINY).apply)({"params": head_params()}, HIDDEN, WORD)
    half = jax.jit(MaskedLMHead(config).apply)({"params": head_params()}, HIDDEN.astype(jnp.bfloat16), WORD)
    assert half.dtype == jnp.float32 and (half[..., 50:] == LOWEST).all()
    assert np.abs(half - full)[..., :50].max() < 0.03 * np.abs(full[..., :50]).max()
    assert len(np.unique(half.astype(jnp.bfloat16))) < len(np.unique(half))  # products were added up in float32


def test_the_dense_layer_starts_as_the_kernels_and_the_output_bias_at_zero():
    wide = dataclasses.replace(TINY, width=64, embedding_width=64)
    params = MaskedLMHead(wide).init(jax.random.key(0), jnp.zeros((1, 1, 64)), jnp.zeros((128, 64)))["params"]
    assert np.std(params["dense"]["kernel"]) == pytest.approx(0.0176, rel=0.06)
    assert 0.039 < np.abs(params["dense"]["kernel"]).max() <= 0.04
    assert not params["output_bias"].any() and not params["dense"]["bias"].any()


def test_a_bare_head_is_the_word_table_alone():
    config = dataclasses.replace(TINY, width=12, body="gpt2")
    hidden = jnp.asarray(RANDOM.randn(2, 3, 12), jnp.float32)
    assert not MaskedLMHead(config).init(jax.random.key(0), hidden, WORD)
    found = MaskedLMHead(config).apply({}, hidden, WORD)
    np.testing.assert_allclose(found[..., :50], hidden @ WORD[:50].T, rtol=1e-5, atol=1e-5)
    assert (found[..., 50:] == LOWEST).all()


# -- two towers -------------------------------------------------------------------------------------------------------

DEEP = dataclasses.replace(TINY, layers=2)
DOCUMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])  # two documents and a place of padding


@functools.cache
def two_tower(body="electra", wrap=False):
    """The module, its parameters and its jitted `apply`."""
    generator = Generator(dataclasses.replace(DEEP, body=body), kind="two_tower", wrap=wrap)
    mask = jnp.ones((1, 1, 1, 8), bool)
    shapes = jax.eval_shape(generator.init, jax.random.key(0), jnp.zeros((1, 8, 12)), WORD, mask)
    return generator, random_params(shapes), jax.jit(generator.apply)


def test_each_tower_has_its_own_parameters_and_the_head_takes_both_states():
    params = two_tower()[1]["params"]
    assert set(params) == {"encoder", "backward_encoder", "head"}
    shapes = [jax.tree.map(lambda leaf: leaf.shape, params[name]) for name in ("encoder", "backward_encoder")]
    assert shapes[0] == shapes[1] and "layer_1" in shapes[0]
    assert params["head"]["dense"]["kernel"].shape == (2 * 8, 12)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_place_is_predicted_from_the_forward_state_before_it_and_the_backward_state_after_it(wrap):
    _, params, apply = two_tower(wrap=wrap)
    embedded = jnp.asarray(RANDOM.randn(1, 8, 12), jnp.float32)
    same = DOCUMENTS[0][:, None] == DOCUMENTS[0]
    encode = jax.jit(Encoder(DEEP).apply)
    states = [
        np.asarray(encode({"params": params["params"][name]}, embedded, jnp.asarray((same & order)[None, None])))
        for name, order in (
            ("encoder", np.tri(8, dtype=bool)),
            ("backward_encoder", np.tri(8, dtype=bool).T),
        )
    ]
    before, after = np.roll(states[0], 1, axis=1), np.roll(states[1], -1, axis=1)
    if not wrap:  # nothing stands before places 0, 3 and 7, nothing after 2, 6 and 7
        before[:, [0, 3, 7]] = 0
        after[:, [2, 6, 7]] = 0
    head = jax.jit(MaskedLMHead(DEEP).apply)
    both = jnp.asarray(np.concatenate([before, after], axis=-1))
    expected = head({"params": params["params"]["head"]}, both, WORD)
    found = apply(params, embedded, WORD, document_mask(jnp.asarray(DOCUMENTS)))
    np.testing.assert_allclose(found[..., :50], expected[..., :50], rtol=1e-4, atol=1e-4)


def changes(apply, params, mask, length=8):
    """[i, t]: by how much the logits at t change when the token at i does."""
    embedded = np.tile(RANDOM.randn(1, length, 12), (length + 1, 1, 1))
    embedded[np.arange(length), np.arange(length)] += RANDOM.randn(length, 12)
    mask = jnp.broadcast_to(mask, (length + 1, *mask.shape[1:]))
    logits = np.asarray(apply(params, jnp.asarray(embedded, jnp.float32), WORD, mask))[..., :50]
    return np.abs(logits[:-1] - logits[-1:]).max(-1)


@pytest.mark.parametrize("body", ["electra", "modern"])
def test_no_place_sees_its_own_token_and_all_others_of_its_document(body):
    _, params, apply = two_tower(body)
    found = changes(apply, params, document_mask(jnp.asarray(DOCUMENTS)))
    seen = (DOCUMENTS.T == DOCUMENTS) & ~np.eye(8, dtype=bool)
    assert (found[seen] > 1e-3).all() and (found[~seen] < 1e-5).all()


def test_only_at_the_ends_of_a_row_the_references_wrap_around_shows_a_place_its_own_token():
    _, params, apply = two_tower(wrap=True)
    found = changes(apply, params, jnp.ones((1, 1, 1, 8), bool))
    assert (np.diagonal(found) > 1e-3).tolist() == [True] + [False] * 6 + [True]


def test_the_towers_drop_different_units():
    """With one token, one set of weights and a head that sees the difference of both states, only dropout is left."""
    generator = Generator(dataclasses.replace(TINY, dropout=0.5), kind="two_tower", wrap=True)
    embedded, mask = jnp.ones((1, 1, 12)), jnp.ones((1, 1, 1, 1), bool)
    params = random_params(jax.eval_shape(generator.init, jax.random.key(0), embedded, WORD, mask))["params"]
    half = params["head"]["dense"]["kernel"][:8]
    params["head"]["dense"]["kernel"] = jnp.concatenate([half, -half])
    params["backward_encoder"] = params["encoder"]
    apply = jax.jit(generator.apply)
    plain = apply({"params": params}, embedded, WORD, mask)
    dropped = apply({"params": params}, embedded, WORD, mask, seed=jnp.array([7], jnp.uint32))
    assert np.abs(plain - dropped)[..., :50].max() > 1e-2


# -- a causal one -----------------------------------------------------------------------------------------------------


@functools.cache
def causal(body="electra", **numbers):
    """The module, its parameters and its jitted `apply`."""
    generator = Generator(dataclasses.replace(DEEP, body=body, **numbers), "causal")
    mask = jnp.ones((1, 1, 1, 8), bool)
    shapes = jax.eval_shape(generator.init, jax.random.key(0), jnp.zeros((1, 8, 12)), WORD, mask)
    return generator, random_params(shapes), jax.jit(generator.apply)


@pytest.mark.parametrize("body", ["electra", "modern"])
def test_a_causal_generator_predicts_a_place_from_those_before_it_in_its_document(body):
    _, params, apply = causal(body)
    found = changes(apply, params, document_mask(jnp.asarray(DOCUMENTS)))
    seen = (DOCUMENTS.T == DOCUMENTS) & ~np.tri(8, dtype=bool)
    assert (found[seen] > 1e-3).all() and (found[~seen] < 1e-5).all()


def test_a_causal_generators_place_has_the_state_of_the_one_before_it():
    _, params, apply = causal()
    embedded = jnp.asarray(RANDOM.randn(1, 8, 12), jnp.float32)
    mask = jnp.asarray(((DOCUMENTS[0][:, None] == DOCUMENTS[0]) & np.tri(8, dtype=bool))[None, None])
    states = jax.jit(Encoder(DEEP).apply)({"params": params["params"]["encoder"]}, embedded, mask)
    before = np.roll(states, 1, axis=1)
    before[:, [0, 3, 7]] = 0  # where nothing stands before
    expected = jax.jit(MaskedLMHead(DEEP).apply)({"params": params["params"]["head"]}, jnp.asarray(before), WORD)
    found = apply(params, embedded, WORD, document_mask(jnp.asarray(DOCUMENTS)))
    np.testing.assert_allclose(found[..., :50], expected[..., :50], rtol=1e-4, atol=1e-4)


def test_a_hybrid_reads_some_rows_as_a_causal_generator_does_and_the_others_both_ways():
    generator, params, apply = causal()
    hybrid = Generator(generator.config, "hybrid")
    embedded = jnp.asarray(np.tile(RANDOM.randn(1, 8, 12), (3, 1, 1)), jnp.float32)
    mask = document_mask(jnp.asarray(np.tile(DOCUMENTS, (3, 1))))
    found = jax.jit(hybrid.apply)(params, embedded, WORD, mask, causal=jnp.array([True, False, True]))
    one_way = apply(params, embedded[:1], WORD, mask[:1])[0]
    states = jax.jit(Encoder(DEEP).apply)({"params": params["params"]["encoder"]}, embedded[:1], mask[:1])
    before = np.roll(states, 1, axis=1)
    before[:, [0, 3, 7]] = 0  # where nothing stands before
    both_ways = jax.jit(MaskedLMHead(DEEP).apply)({"params": params["params"]["head"]}, jnp.asarray(before), WORD)[0]
    for row, expected in zip(found, (one_way, both_ways, one_way), strict=True):
        np.testing.assert_allclose(row[..., :50], expected[..., :50], rtol=1e-4, atol=1e-4)
    assert np.abs(one_way - both_ways)[1, :50].max() > 1e-2


@pytest.mark.parametrize(
    ("body", "numbers", "steps"),
    [
        ("electra", (), (1,) * 8),
        ("modern", (("qk_norm", True),), (1,) * 8),
        ("modern", (("scan_layers", True),), (5, 2, 1)),
        ("gpt2", (("width", 12),), (3, 5)),
    ],
)
def test_token_by_token_the_next_ones_logits_are_those_of_the_whole_row_at_once(body, numbers, steps):
    generator, params, apply = causal(body, **dict(numbers))
    c = generator.config
    embedded = jnp.asarray(RANDOM.randn(2, 8, 12), jnp.float32)
    whole = np.asarray(apply(params, embedded, WORD, jnp.ones((2, 1, 1, 8), bool)))
    step = jax.jit(functools.partial(generator.apply, method="next_logits"))
    empty = jnp.zeros((2, 8, c.heads, c.width // c.heads))
    cache, start = [KeyValues(empty, empty)] * c.layers, 0
    for count in steps:
        places = np.arange(start, start + count)
        mask = jnp.broadcast_to(np.arange(8) <= places[:, None], (2, 1, count, 8))
        positions = jnp.broadcast_to(places, (2, count))
        logits, cache = step(params, embedded[:, places], WORD, mask, positions, cache, jnp.asarray(start))
        assert logits.dtype == jnp.float32 and logits.shape == (2, count, 128)
        behind = places[places < 7] + 1  # the logits of place p + 1 are those after the token p
        np.testing.assert_allclose(logits[:, : len(behind), :50], whole[:, behind, :50], rtol=1e-4, atol=1e-4)
        start += count
