"""The decoder's objective against numpy, and its decoding against a plain loop that keeps nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.data.parallel import PairBatches
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.flops import encoder_forward
from electrax.tasks import vocabulary
from electrax.tasks.rewrite import RewriteTask
from electrax.training.sharding import spec_of
from tests.fixtures.microbatches import assert_parts_add_up

ENCODER = EncoderConfig(20, 2, 16, 2, 24, embedding_width=8, max_length=12, dropout=0.0, attention_dropout=0.0)
PAD, CLS, SEP = 0, 2, 3
IDS = np.array([[CLS, 7, 8, 9, SEP, PAD], [CLS, 11, SEP, PAD, PAD, PAD]], np.int32)
TARGET = np.array([[CLS, 12, 13, SEP, PAD], [CLS, 14, 15, 16, SEP]], np.int32)
BATCH = {"ids": jnp.asarray(IDS), "target": jnp.asarray(TARGET), "weight": jnp.ones(2)}


def task_of(body: str = "electra", **changes) -> RewriteTask:
    encoder = dataclasses.replace(ENCODER, body=body)
    decoder = dataclasses.replace(encoder, layers=changes.pop("layers", 2), vocab_size=changes.pop("vocab_size", 20))
    fields = {"cls_id": CLS, "end_id": SEP, "most": 6, "batch_size": 2, "metric": "loss", **changes}
    return RewriteTask(encoder, PAD, SEP, decoder=decoder, **fields)


def params_of(task: RewriteTask) -> dict:
    params = jax.jit(lambda key: task.init(key, BATCH))(jax.random.key(0))
    # larger weights than those of the start, so that every token matters
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)


def logits_of(task: RewriteTask, params: dict, ids: np.ndarray, target: np.ndarray) -> np.ndarray:
    batch = {"ids": jnp.asarray(ids), "target": jnp.asarray(target)}
    return np.asarray(jax.jit(task.logits)(params, batch), np.float64)


BODIES = pytest.mark.parametrize("body", ["electra", "modern"])


@BODIES
def test_greedy_decoding_with_a_cache_is_that_of_a_loop_without_one(body):
    task = task_of(body)
    params = params_of(task)
    found = jax.jit(lambda params, ids: task.rewrite(params, ids, beams=1))(params, IDS)
    forward = jax.jit(task.logits)
    for row in range(2):
        written = [CLS]
        while written[-1] != SEP and len(written) <= task.most:
            target = np.full((1, task.most + 1), PAD, np.int32)
            target[0, : len(written)] = written
            logits = forward(params, {"ids": IDS[row : row + 1], "target": target})
            written.append(int(jnp.argmax(logits[0, len(written) - 1])))
        assert found.ids[row, 0, : len(written) - 1].tolist() == written[1:]
        assert found.lengths[row, 0] == len(written) - 1


@BODIES
def test_a_beams_score_is_what_the_training_logits_give_its_tokens(body):
    task = task_of(body, beams=3)
    params = params_of(task)
    found = jax.jit(lambda params, ids: task.rewrite(params, ids, n_best=3))(params, IDS)
    for row in range(2):
        scores = []
        for beam in range(3):
            tokens = found.ids[row, beam, : found.lengths[row, beam]].tolist()
            logits = logits_of(task, params, IDS[row : row + 1], np.array([[CLS, *tokens]], np.int32))[0]
            each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total = sum(each[place, token] for place, token in enumerate(tokens))
            scores.append(total / ((5 + len(tokens)) / 6))
        np.testing.assert_allclose(found.scores[row], scores, rtol=1e-4)
        assert scores == sorted(scores, reverse=True)


@BODIES
@pytest.mark.parametrize("scan_layers", [False, True])
def test_source_tokens_that_a_beam_has_not_read_cost_it_the_coverage_penalty(body, scan_layers):
    plain = task_of(body, beams=3, coverage_penalty=0.0)
    task = task_of(body, beams=3, coverage_penalty=0.5)
    task = dataclasses.replace(task, decoder=dataclasses.replace(task.decoder, scan_layers=scan_layers))
    params = params_of(task)
    found = jax.jit(lambda params, ids: task.rewrite(params, ids, n_best=3))(params, IDS)
    without = jax.jit(lambda params, ids: plain.rewrite(params, ids, n_best=3))(params, IDS)
    assert not np.allclose(found.scores, without.scores, atol=0.1)
    for row, real in enumerate([5, 3]):
        scores = []
        for beam in range(3):
            tokens = found.ids[row, beam, : found.lengths[row, beam]].tolist()
            target = np.array([[CLS, *tokens]], np.int32)
            logits = logits_of(task, params, IDS[row : row + 1], target)[0]
            each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total = sum(each[place, token] for place, token in enumerate(tokens))
            read = attention_of(task, params, IDS[row : row + 1, :real], target[:, :-1]).sum(0)
            scores.append(total / ((5 + len(tokens)) / 6) + 0.5 * np.log(np.minimum(read, 1.0)).sum())
        np.testing.assert_allclose(found.scores[row], scores, rtol=1e-4)
        assert scores == sorted(scores, reverse=True)


def attention_of(task: RewriteTask, params: dict, ids: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What the last layer of the decoder takes of each source token at each target token [T, S], without a cache."""
    memory = task.hidden(params, jnp.asarray(ids))
    embedded = Embeddings(task.decoder).apply({"params": params["embeddings"]}, jnp.asarray(target))
    looks_back = jnp.tril(jnp.ones((target.shape[1],) * 2, bool))[None, None]
    all_real = jnp.ones((1, 1, 1, ids.shape[1]), bool)
    decoder = {"params": params["decoder"]}
    _, seen = Encoder(task.decoder).apply(
        decoder, embedded, looks_back, None, None, memory, all_real, mutable=["attended"]
    )
    weights = np.asarray(seen["attended"]["weights"][0][0], np.float64)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    return weights


def test_an_output_depends_on_no_other_row_and_on_no_padding():
    task = task_of(beams=3, coverage_penalty=0.2)
    params = params_of(task)
    rewrite = jax.jit(task.rewrite)
    together = rewrite(params, IDS)
    alone = rewrite(params, IDS[1:, :3])
    assert together.ids[1].tolist() == alone.ids[0].tolist()
    np.testing.assert_allclose(together.scores[1], alone.scores[0], rtol=1e-5)


def test_a_token_is_predicted_from_the_source_and_the_tokens_before_it_alone():
    task = task_of()
    params = params_of(task)
    before = logits_of(task, params, IDS, TARGET)
    later = TARGET.copy()
    later[:, 2] = 17
    after = logits_of(task, params, IDS, later)
    np.testing.assert_allclose(after[:, :2], before[:, :2], atol=1e-5)
    assert np.abs(after[:, 2:] - before[:, 2:]).max() > 1e-2
    other = IDS.copy()
    other[:, 1] = 17
    assert np.abs(logits_of(task, params, other, TARGET)[:, 0] - before[:, 0]).max() > 1e-2


def test_the_loss_is_the_smoothed_cross_entropy_of_every_target_token():
    task = task_of(label_smoothing=0.1)
    params = params_of(task)
    prepared = task.prepare(BATCH, jax.random.split(jax.random.key(0), 2))
    loss, metrics = jax.jit(task.loss)(params, prepared)
    logits = logits_of(task, params, IDS, TARGET)[..., :20]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    true = [log_p[row, place, TARGET[row, place + 1]] for row in range(2) for place in range(4 if row else 3)]
    mean = [log_p[row, place].mean() for row in range(2) for place in range(4 if row else 3)]
    np.testing.assert_allclose(loss, -0.9 * np.mean(true) - 0.1 * np.mean(mean), rtol=1e-5)
    np.testing.assert_allclose(metrics["token_loss"].value(), -np.mean(true), rtol=1e-5)
    assert metrics["token_loss"].weight == 7


def of_rows(task: RewriteTask, rows: int, length: int) -> dict:
    """A prepared batch whose targets are of different lengths."""
    target = np.array(jax.random.randint(jax.random.key(2), (rows, length), 4, task.decoder.vocab_size))
    for row in range(rows):
        target[row, length - row % 3 :] = PAD
    batch = {"ids": jnp.asarray(np.resize(IDS, (rows, 6))), "target": jnp.asarray(target), "weight": jnp.ones(rows)}
    return task.prepare(batch, jax.random.split(jax.random.key(0), rows))


def hold_logits_of(monkeypatch, task: RewriteTask, rows: int, places: int) -> None:
    held = rows * places * task.decoder.padded_vocab_size
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", -(-held // jax.device_count()))


def plain_loss(task: RewriteTask, params: dict, prepared: dict) -> jax.Array:
    """From all logits at once, with the gradient that JAX finds."""
    target, s = prepared["target"][:, 1:], task.label_smoothing
    log_p = jax.nn.log_softmax(task.logits(params, prepared, train=True))
    true = jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    mean = jnp.mean(log_p[..., : task.decoder.vocab_size], axis=-1)
    return jnp.sum(((s - 1) * true - s * mean) * prepared["share"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_loss_and_gradients_are_the_plain_ones_however_many_rows_logits_are_held(monkeypatch, rows, smoothing):
    task = task_of(own_vocabulary=True, vocab_size=140, label_smoothing=smoothing)
    task = dataclasses.replace(task, decoder=dataclasses.replace(task.decoder, dropout=0.1))
    params, prepared = params_of(task), of_rows(task, 6, 5)
    expected = jax.jit(jax.value_and_grad(lambda params: plain_loss(task, params, prepared)))(params)
    hold_logits_of(monkeypatch, task, rows, places=4)
    loss, grads = jax.jit(jax.value_and_grad(lambda params: task.loss(params, prepared)[0]))(params)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    for own, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6 * max(1.0, float(jnp.abs(other).max())))


@pytest.mark.parametrize("rows", [1, 6])
def test_an_evaluation_is_the_plain_one_however_many_rows_logits_are_held(monkeypatch, rows):
    task = task_of(own_vocabulary=True, vocab_size=140)
    params, prepared = params_of(task), of_rows(task, 6, 5)
    target, logits = np.array(prepared["target"]), logits_of(task, params, prepared["ids"], prepared["target"])
    target[:, 1] = logits[:, 0].argmax(-1)  # some are right
    prepared = prepared | {"target": jnp.asarray(target)}
    logits, real = logits_of(task, params, prepared["ids"], target), target[:, 1:] != PAD
    log_p = np.take_along_axis(logits, target[:, 1:, None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    right = (logits.argmax(-1) == target[:, 1:])[real].mean()
    hold_logits_of(monkeypatch, task, rows, places=4)
    means, _ = jax.jit(lambda params: task.evaluate(params, prepared))(params)
    np.testing.assert_allclose(means["loss"].value(), -log_p[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(means["accuracy"].value(), right, rtol=1e-6)
    assert 0 < right < 1


def test_a_step_holds_no_more_logits_at_once_than_those_of_a_chunk(monkeypatch):
    task = task_of(own_vocabulary=True, vocab_size=8192)
    params, prepared = jax.eval_shape(lambda: task.init(jax.random.key(0), BATCH)), of_rows(task, 16, 12)
    logits = 16 * 11 * 8192 * 4  # bytes

    def temporary() -> int:
        gradient = jax.jit(jax.grad(lambda *given: task.loss(*given), has_aux=True))
        return gradient.lower(params, prepared).compile().memory_analysis().temp_size_in_bytes

    assert temporary() > logits
    hold_logits_of(monkeypatch, task, 1, places=11)
    assert temporary() < logits / 2


def test_a_frozen_encoder_costs_no_gradient_of_the_sources_alone():
    pairs = PairBatches.of([[CLS, 7, 8, SEP]], [[CLS, 9, SEP]], 1, (PAD, PAD), 1)
    task = task_of(train=pairs, freeze_embeddings=True, freeze_layers=2)
    assert task.train_flops() == pytest.approx(3 * task.forward_flops() - 2 * 4 * encoder_forward(ENCODER, 4))


def test_loss_and_gradients_of_single_rows_add_up():
    task = dataclasses.replace(task_of(), decoder=dataclasses.replace(task_of().decoder, dropout=0.1))
    assert_parts_add_up(task, params_of(task), of_rows(task, 3, 5))


def test_rows_that_fill_a_batch_do_not_count():
    task = task_of()
    params = params_of(task)
    batch = BATCH | {"weight": jnp.array([1.0, 0.0])}
    loss = jax.jit(task.loss)(params, task.prepare(batch, jax.random.split(jax.random.key(0), 2)))[0]
    one = {name: values[:1] for name, values in BATCH.items()}
    alone = jax.jit(task.loss)(params, task.prepare(one, jax.random.split(jax.random.key(0), 1)))[0]
    np.testing.assert_allclose(loss, alone, rtol=1e-6)


@BODIES
def test_a_shared_decoder_is_one_with_copies_of_the_encoders_weights(body):
    shared = task_of(body, weights="shared")
    params = params_of(shared)
    assert set(params["decoder"]["layer_0"]) == {"cross_attention", "cross_attention_norm"}
    encoder = params["discriminator"]["encoder"]
    copied = {name: {**part, **params["decoder"].get(name, {})} for name, part in encoder.items()}
    expected = logits_of(task_of(body), params | {"decoder": copied}, IDS, TARGET)
    np.testing.assert_allclose(logits_of(shared, params, IDS, TARGET), expected, rtol=1e-6)


def test_a_vocabulary_of_its_own_has_a_table_of_its_own():
    task = task_of(own_vocabulary=True, vocab_size=30)
    params = params_of(task)
    assert params["target_embeddings"]["word"].shape == (128, 8)
    target = TARGET.copy()
    target[0, 1] = 29
    assert logits_of(task, params, IDS, target).shape == (2, 4, 128)


def test_every_parameter_of_a_decoder_has_a_place_on_the_mesh():
    for body in ("electra", "modern"):
        task = task_of(body, own_vocabulary=True)
        params = jax.eval_shape(lambda key, task=task: task.init(key, BATCH), jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            assert len(spec_of(jax.tree_util.keystr(path, simple=True, separator="/"))) <= leaf.ndim


def test_a_decoder_that_always_writes_the_same_is_found():
    task = task_of()
    same = {"output": np.array([[5, 3, 0], [5, 3, 0]])}
    assert task.diagnose({}, same) == ["it writes the same for every text"]
    assert task.diagnose({}, {"output": np.array([[5, 3, 0], [6, 3, 0]])}) == []
