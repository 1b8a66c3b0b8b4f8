"""Generators that read from left to right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.config import UserError
from electrax.experiment.config import DataConfig, PretrainConfig
from electrax.experiment.pretrain import make_task as task_of
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.generator import MaskedLMHead
from electrax.models.sizes import GeneratorConfig
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from tests.fixtures.pretraining import FAST_COMPILE, evaluate, loss_and_grads, means, params_of, places, prepare

PAD, CLS, SEP, MASK = 0, 1, 2, 3
LENGTH, VOCABULARY = 12, 50
TOWER = EncoderConfig(
    vocab_size=VOCABULARY, layers=1, width=16, heads=2, feed_forward=32, embedding_width=12, max_length=LENGTH
)
SMALL = dataclasses.replace(TOWER, width=8, heads=1, feed_forward=16)

# two documents in a row, the later rows shorter
IDS = np.random.RandomState(0).randint(5, VOCABULARY, (4, LENGTH)).astype(np.int32)
IDS[:, [0, 7]], IDS[:, [6, 11]] = CLS, SEP
IDS[1, 10:], IDS[3, 5:] = [SEP, PAD], [SEP] + [PAD] * 6
REAL, PREDICTED = IDS != PAD, (IDS != PAD) & (IDS != CLS)
KEYS = jax.random.split(jax.random.key(3), 4)


def make_task(generator_kind="causal", layout="packed", **objective):
    special, objective = SpecialIds(PAD, CLS, SEP, MASK), ObjectiveConfig(**{"mask_prob": 0.3} | objective)
    generator = TOWER if objective.kind == "mlm" else SMALL
    return PretrainTask(objective, TOWER, generator, special, layout=layout, generator_kind=generator_kind)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def state_and_logits(task, params, ids, types, positions, mask):
    """Of the generator's parts, put together anew: what follows each token."""
    embedded = Embeddings(TOWER).apply({"params": params["embeddings"]}, ids, types, positions)
    hidden = Encoder(task.generator).apply({"params": params["generator"]["encoder"]}, embedded, mask, positions)
    head = {"params": params["generator"]["head"]}
    return MaskedLMHead(task.generator).apply(head, hidden, params["embeddings"]["word"])


def log_p(task, params, ids=IDS, both_ways=False):
    """[B, L, V]: the log-probabilities of what stands at a place, given the part of its text before, or all of it; in
    packed rows a text is a document, in others both segments. At the first place of a text they mean nothing."""
    document = np.cumsum(ids == CLS, axis=1) * (ids != PAD)
    same, place = document[:, :, None] == document[:, None], np.arange(LENGTH)
    positions = place - np.maximum.accumulate(np.where(ids == CLS, place, 0), axis=1)
    types = np.zeros_like(ids)
    if task.layout == "segments":
        same, positions = np.broadcast_to((ids != PAD)[:, None], same.shape), np.broadcast_to(place, ids.shape)
        types = np.minimum(np.cumsum(ids == SEP, axis=1) - (ids == SEP), 1) * (ids != PAD)
    mask = (same & (both_ways | np.tri(LENGTH, dtype=bool)))[:, None]
    logits = np.float64(state_and_logits(task, params, ids, types, positions, mask))[..., :VOCABULARY]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.roll(logits, 1, axis=1)


def at(log_p, tokens):
    return np.take_along_axis(log_p, np.asarray(tokens)[..., None], axis=-1)[..., 0]


# -- a causal generator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "segments"])
@pytest.mark.parametrize("kind", ["rtd", "mlm"])
def test_a_causal_lm_is_judged_at_every_token_but_cls_which_it_reads_in_the_original_row(kind, layout):
    task = make_task(kind=kind, layout=layout)
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    assert (prepared["masked"] == IDS).all() and (prepared["hidden"] == prepared["used"]).all()
    np.testing.assert_allclose(prepared["place_weight"], PREDICTED / (PREDICTED.sum() + 1e-6), rtol=1e-6)
    found, expected = means(evaluate(task, params_of(task), prepared)[0]), log_p(task, params_of(task))
    right = expected.argmax(-1) == IDS
    assert found["mlm_loss"] == pytest.approx(-at(expected, IDS)[PREDICTED].mean(), rel=1e-4)
    assert found["mlm_accuracy"] == pytest.approx(right[PREDICTED].mean())
    assert found["masked_accuracy"] == pytest.approx(right[places(prepared)].mean())


def test_with_the_loss_of_the_chosen_tokens_alone_a_causal_lm_is_judged_there():
    task = make_task(causal_loss="chosen")
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    found, expected = means(evaluate(task, params_of(task), prepared)[0]), log_p(task, params_of(task))
    assert found["mlm_loss"] == pytest.approx(-at(expected, IDS)[places(prepared)].mean(), rel=1e-4)


def test_a_causal_generators_likeliest_tokens_replace_the_chosen_ones_at_temperature_0():
    task = make_task(temperature=0.0)
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    metrics, arrays = jax.device_get(evaluate(task, params_of(task), prepared))
    chosen, best = places(prepared), log_p(task, params_of(task)).argmax(-1)
    assert chosen.sum() == prepared["used"].sum() == 11
    np.testing.assert_array_equal(arrays["corrupted"], np.where(chosen, best, IDS))
    np.testing.assert_array_equal(arrays["replaced"], chosen & (best != IDS))
    assert means(metrics)["sampled_accuracy"] == pytest.approx((best == IDS)[chosen].mean())


def test_a_causal_generators_samples_have_its_probabilities_and_may_leave_out_the_true_token():
    """Of 4,000 draws for one place, against the softmax at twice the temperature."""
    count = 4000
    ids = np.tile(IDS[:1], (count, 1))
    keys = jax.random.split(jax.random.key(5), count)
    for disallow in (False, True):
        task = make_task(temperature=2.0, disallow_correct=disallow, causal_loss="chosen", vocabulary_rows=100)
        prepared = jax.device_get(prepare(task, ids, keys))
        _, arrays = jax.device_get(evaluate(task, params_of(task), prepared))
        rows = (prepared["used"] & (prepared["slots"] == 4)).any(1)
        p = np.exp(log_p(task, params_of(task), IDS[:1])[0, 4] / 2)
        p[IDS[0, 4]] *= not disallow
        share = np.bincount(arrays["corrupted"][rows, 4], minlength=VOCABULARY) / rows.sum()
        assert rows.sum() > 800 and np.abs(share - p / p.sum()).max() < 5 * 0.5 / np.sqrt(rows.sum())
        assert not disallow or not share[IDS[0, 4]]


def test_a_causal_generators_gradients_are_the_same_where_the_vocabulary_is_taken_in_chunks():
    task = make_task()
    prepared, chunked = prepare(task, IDS, KEYS), dataclasses.replace(task.objective, vocabulary_rows=2)
    (whole_loss, _), whole = loss_and_grads(task, params_of(task), prepared)
    (loss, _), grads = loss_and_grads(dataclasses.replace(task, objective=chunked), params_of(task), prepared)
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


# -- a hybrid one -----------------------------------------------------------------------------------------------------


def test_a_hybrids_rows_are_drawn_one_by_one_as_causal_or_masked():
    count = 4000
    ids, keys = np.tile(IDS[:1], (count, 1)), jax.random.split(jax.random.key(5), count)
    found = jax.device_get(prepare(make_task("hybrid", causal_share=0.25), ids, keys))
    masked = jax.device_get(prepare(make_task("masked"), ids, keys))
    causal = found["causal"]
    assert abs(causal.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / count)
    for name in ("slots", "used", "dropout_seed"):  # which tokens are chosen does not depend on it
        np.testing.assert_array_equal(found[name], masked[name])
    for name in ("masked", "hidden"):
        np.testing.assert_array_equal(found[name][~causal], masked[name][~causal])
    assert (found["masked"][causal] == ids[causal]).all() and (found["hidden"] == found["used"])[causal].all()
    # a row is what its key says, whatever rows are beside it
    some = jax.device_get(prepare(make_task("hybrid", causal_share=0.25), ids[7:11], keys[7:11]))
    np.testing.assert_array_equal(some["causal"], causal[7:11])


def test_by_default_one_row_of_sixteen_is_causal():
    assert ObjectiveConfig().causal_share == 1 / 16


@pytest.fixture(scope="module")
def hybrid():
    """(task, its prepared batch with two rows of each kind, the log-probabilities of what stands at each place)."""
    task = make_task("hybrid", causal_share=0.5, temperature=0.0)
    keys = (jax.random.split(jax.random.key(number), 4) for number in range(100))
    prepared = next(p for p in (jax.device_get(prepare(task, IDS, key)) for key in keys) if p["causal"].sum() == 2)
    rows = [log_p(task, params_of(task), prepared["masked"], both_ways=both)[:, :, None] for both in (True, False)]
    return task, prepared, np.where(prepared["causal"][:, None, None, None], rows[1], rows[0])[:, :, 0]


def test_each_row_of_a_hybrid_counts_the_same_with_all_tokens_or_with_the_chosen_ones(hybrid):
    task, prepared, expected = hybrid
    judged = np.where(prepared["causal"][:, None], PREDICTED, places(prepared))
    weight = judged / judged.sum(1, keepdims=True) / 4
    np.testing.assert_allclose(prepared["place_weight"], weight, rtol=1e-5)
    found = means(evaluate(task, params_of(task), prepared)[0])
    assert found["mlm_loss"] == pytest.approx(-(at(expected, IDS) * weight).sum(), rel=1e-4)
    assert found["mlm_accuracy"] == pytest.approx(((expected.argmax(-1) == IDS) * weight).sum())
    (loss, metrics), _ = loss_and_grads(task, params_of(task), prepared)  # with dropout
    found = means(metrics)
    assert float(loss) == pytest.approx(found["mlm_loss"] + 50 * found["rtd_loss"], rel=1e-4)


def test_both_kinds_of_rows_give_samples_to_the_discriminator(hybrid):
    task, prepared, expected = hybrid
    _, arrays = jax.device_get(evaluate(task, params_of(task), prepared))
    chosen = places(prepared)
    assert chosen[prepared["causal"]].any() and chosen[~prepared["causal"]].any()
    np.testing.assert_array_equal(arrays["corrupted"], np.where(chosen, expected.argmax(-1), IDS))


def test_a_hybrid_may_be_judged_at_the_chosen_tokens_alone(hybrid):
    task, prepared, expected = hybrid
    task = dataclasses.replace(task, objective=dataclasses.replace(task.objective, causal_loss="chosen"))
    found = means(evaluate(task, params_of(task), prepared)[0])
    assert found["mlm_loss"] == pytest.approx(-at(expected, IDS)[places(prepared)].mean(), rel=1e-4)


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generator", "kind"), [("causal", "rtd"), ("causal", "mlm"), ("hybrid", "rtd")])
def test_a_few_steps_on_one_batch_lower_the_losses(generator, kind):
    task = make_task(generator, kind=kind, causal_share=0.5)
    prepared = prepare(task, IDS, KEYS)
    params = jax.jit(lambda: task.init(jax.random.key(0), {"ids": IDS}))()
    assert ("discriminator" in params) == (kind == "rtd")
    optimizer = optax.adam(3e-3)
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(20):
        (_, metrics), grads = loss_and_grads(task, params, prepared)
        updates, state = update(grads, state)
        params = optax.apply_updates(params, updates)
        seen.append(means(metrics))
    for name in ("mlm_loss", "rtd_loss")[: 2 if kind == "rtd" else 1]:
        assert seen[-1][name] < 0.9 * seen[0][name], name


def test_flops_of_a_causal_generator_count_the_vocabulary_at_every_place_that_it_learns_from():
    """By hand, as for the other generators: a layer 8D² + 4LD + 4DF, a projection 2ED, a place 2DE + 2E · 128."""
    large = 2 * 12 * 16 + 8 * 256 + 4 * 12 * 16 + 4 * 16 * 32 + 2 * 256 + 2 * 16
    small = 2 * 12 * 8 + 8 * 64 + 4 * 12 * 8 + 4 * 8 * 16
    place = 2 * 8 * 12 + 2 * 12 * 128
    assert make_task().flops(5, 12) == make_task("hybrid").flops(5, 12) == 3 * 5 * 12 * (large + small + place)
    assert make_task(causal_loss="chosen").flops(5, 12) == 3 * 5 * (12 * (large + small) + 3 * place)


def test_electric_is_not_for_a_causal_generator_and_says_why():
    config = PretrainConfig(
        workdir="runs/any",
        steps=1,
        objective=ObjectiveConfig(kind="electric"),
        generator=GeneratorConfig(kind="causal"),
        data=DataConfig(max_length=32),
    )
    with pytest.raises(UserError) as caught:
        task_of(config, 50, {"pad": 0, "cls": 1, "sep": 2, "mask": 3}, None)
    assert str(caught.value) == (
        'objective.kind "electric" predicts every token from the text around it, which generator.kind "causal" cannot, '
        'as it sees no text behind; set generator.kind "two_tower"'
    )
