import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.encoder import EncoderConfig
from electrax.models.spans import JointSpanHead, PlainSpanHead
from tests.fixtures.weights import random_params

WIDTH, LENGTH, BEAM = 6, 7, 3
CONFIG = EncoderConfig(vocab_size=16, layers=1, width=WIDTH, heads=1, feed_forward=8, max_length=LENGTH)
HIDDEN = np.random.RandomState(0).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)
MASK = np.array([[1, 0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 0]], bool)
START = np.array([4, 0], np.int32)


def make(head):
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), jnp.asarray(HIDDEN)))
    return random_params(shapes, seed=3)


@pytest.fixture(scope="module")
def joint():
    return JointSpanHead(CONFIG), make(JointSpanHead(CONFIG))


@pytest.fixture(scope="module")
def plain():
    return PlainSpanHead(CONFIG), make(PlainSpanHead(CONFIG))


def beams(head, params, hidden=HIDDEN, mask=MASK, beam=BEAM):
    run = jax.jit(lambda params, hidden, mask: head.apply(params, hidden, mask, beam, method=head.beams))
    return jax.device_get(run(params, hidden, mask))


# -- an independent implementation, in float64 ------------------------------------------------------------------------


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def dense(x, params):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def pair_score(a, b, params):
    """On concatenated states, with one kernel made of the two."""
    kernel = np.concatenate([params["first"]["kernel"], params["second"]["kernel"]]).astype(np.float64)
    inner = np.concatenate([a, b], axis=-1) @ kernel + np.asarray(params["second"]["bias"], np.float64)
    return dense(gelu(inner), params["output"])[..., 0]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def joint_start(h, mask, params):
    return dense(h, params["start"])[:, 0] - 1000.0 * ~mask


def joint_end(h, mask, start, params):
    return pair_score(np.repeat(h[start][None], len(h), 0), h, params["end"]) - 1000.0 * ~mask


def joint_null(h, start_logits, params):
    likely = np.exp(log_softmax(start_logits)) @ h
    return pair_score(h[0], likely, params["answerable"])


# -- the joint head ---------------------------------------------------------------------------------------------------


def test_the_joint_head_in_training_gives_the_end_for_the_true_start(joint):
    head, params = joint
    logits = jax.device_get(jax.jit(head.apply)(params, HIDDEN, MASK, START))
    for i, h in enumerate(HIDDEN.astype(np.float64)):
        start = joint_start(h, MASK[i], params["params"])
        np.testing.assert_allclose(logits.start[i], start, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            logits.end[i], joint_end(h, MASK[i], START[i], params["params"]), rtol=1e-5, atol=1e-4
        )
        np.testing.assert_allclose(logits.null[i], joint_null(h, start, params["params"]), rtol=1e-5, atol=1e-4)
    assert logits.start.dtype == logits.end.dtype == logits.null.dtype == np.float32


def test_the_joint_heads_beams_are_the_best_ends_of_the_best_starts(joint):
    head, params = joint
    found = beams(head, params)
    assert found.end.shape == found.score.shape == (2, BEAM, BEAM)
    for i, h in enumerate(HIDDEN.astype(np.float64)):
        start = joint_start(h, MASK[i], params["params"])
        best = np.argsort(-start)[:BEAM]
        assert found.start[i].tolist() == best.tolist()
        for k, place in enumerate(best):
            ends = log_softmax(joint_end(h, MASK[i], place, params["params"]))
            order = np.argsort(-ends)[:BEAM]
            assert found.end[i, k].tolist() == order.tolist()
            np.testing.assert_allclose(found.score[i, k], log_softmax(start)[place] + ends[order], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.null[i], joint_null(h, start, params["params"]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["joint", "plain"])
def test_a_beam_wider_than_the_row_holds_each_token_once_and_nothing_else(kind, request):
    found = beams(*request.getfixturevalue(kind), beam=LENGTH + 2)
    assert found.start.shape == (2, LENGTH + 2)
    assert sorted(found.start[0, :LENGTH].tolist()) == list(range(LENGTH))
    assert np.isfinite(found.score[:, :LENGTH, :LENGTH]).all()
    assert (found.score[:, LENGTH:] == -np.inf).all() and (found.score[:, :, LENGTH:] == -np.inf).all()


@pytest.mark.parametrize("kind", ["joint", "plain"])
def test_padding_changes_nothing(kind, request):
    head, params = request.getfixturevalue(kind)
    more = np.concatenate([HIDDEN, np.full((2, 4, WIDTH), 5.0, np.float32)], axis=1)
    padded = beams(head, params, more, np.pad(MASK, ((0, 0), (0, 4))), beam=2)
    for a, b in zip(beams(head, params, beam=2), padded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["joint", "plain"])
def test_neither_start_nor_end_falls_on_a_token_that_may_not_be(kind, request):
    found = beams(*request.getfixturevalue(kind))
    assert MASK[1].sum() == BEAM
    assert set(found.start[1].tolist()) == set(found.end[1].ravel().tolist()) == {0, 4, 5}


@pytest.mark.parametrize("kind", ["joint", "plain"])
def test_every_weight_and_the_encoder_get_a_gradient(kind, request):
    head, params = request.getfixturevalue(kind)

    def loss(params, hidden):
        start, end, null = head.apply(params, hidden, jnp.asarray(MASK), jnp.asarray(START))
        return jnp.sum(jax.nn.log_softmax(start)[:, 4] + jax.nn.log_softmax(end)[:, 5] + null**2)

    grads, states = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, HIDDEN)
    # the start's bias moves all logits alike, so that only the sum of [CLS]'s two logits feels it
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    silent = [name for name, leaf in flat.items() if float(jnp.abs(leaf).max()) < 1e-6]
    assert silent == ([] if kind == "plain" else ["['params']['end']['output']['bias']", "['params']['start']['bias']"])
    assert (np.abs(states).sum(-1) > 0)[MASK].all()


def test_the_layers_on_pairs_start_as_one_layer_on_the_concatenation_would():
    config = EncoderConfig(vocab_size=16, layers=1, width=64, heads=1, feed_forward=8, max_length=LENGTH)
    params = jax.jit(JointSpanHead(config).init)(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"]
    limit = math.sqrt(6 / (128 + 512))  # glorot_uniform, [128, 512]
    for name in ("end", "answerable"):
        kernel = np.concatenate([params[name]["first"]["kernel"], params[name]["second"]["kernel"]])
        assert kernel.shape == (128, 512) and "bias" not in params[name]["first"]
        assert np.abs(kernel).max() == pytest.approx(limit, rel=1e-3)
        assert kernel.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)
        assert np.abs(params[name]["output"]["kernel"]).max() == pytest.approx(math.sqrt(6 / 513), rel=0.02)
    assert params["start"]["kernel"].shape == (64, 1)


# -- the plain head ---------------------------------------------------------------------------------------------------


def test_the_plain_head_is_one_layer_with_two_outputs(plain):
    head, params = plain
    logits = jax.device_get(jax.jit(head.apply)(params, HIDDEN, MASK, START))
    expected = dense(HIDDEN.astype(np.float64), params["params"]["output"]) - 1000.0 * ~MASK[..., None]
    np.testing.assert_allclose(logits.start, expected[..., 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.end, expected[..., 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.null, expected[:, 0].sum(-1), rtol=1e-5, atol=1e-5)


def test_the_plain_heads_beams_are_the_best_starts_with_the_best_ends(plain):
    head, params = plain
    found = beams(head, params)
    expected = dense(HIDDEN.astype(np.float64), params["params"]["output"]) - 1000.0 * ~MASK[..., None]
    for i in range(2):
        start, end = (np.argsort(-expected[i, :, k])[:BEAM] for k in range(2))
        assert found.start[i].tolist() == start.tolist()
        assert found.end[i].tolist() == [end.tolist()] * BEAM
        score = expected[i, start, 0][:, None] + expected[i, end, 1][None]
        np.testing.assert_allclose(found.score[i], score, rtol=1e-5, atol=1e-5)


def test_both_heads_compute_in_the_towers_type_and_answer_in_float32():
    import dataclasses

    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    for head in (JointSpanHead(config), PlainSpanHead(config)):
        params = make(head)
        logits = jax.eval_shape(head.apply, params, jnp.asarray(HIDDEN, jnp.bfloat16), MASK, START)
        assert {x.dtype for x in logits} == {jnp.dtype("float32")}
