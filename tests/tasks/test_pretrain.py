import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.generator import Generator
from electrax.models.masks import document_index, document_mask, document_positions
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from electrax.training.sharding import MeshConfig, make_mesh
from electrax.training.state import gradients
from tests.fixtures.pretraining import (
    FAST_COMPILE,
    evaluate,
    loss_and_grads,
    loss_of,
    means,
    params_of,
    places,
    prepare,
)

PAD, CLS, SEP, MASK, UNK = 0, 1, 2, 3, 4
SPECIAL = SpecialIds(PAD, CLS, SEP, MASK)
LENGTH, VOCABULARY, SLOTS = 20, 50, 6  # 6 = int(0.305 · 20)
TOWER = EncoderConfig(
    vocab_size=VOCABULARY, layers=1, width=16, heads=2, feed_forward=32, embedding_width=12, max_length=LENGTH
)
SMALL = dataclasses.replace(TOWER, width=8, heads=1, feed_forward=16)


def make_task(shared=True, faithful=False, layout="packed", **objective):
    generator = SMALL if shared else dataclasses.replace(SMALL, embedding_width=8)
    objective = ObjectiveConfig(**{"mask_prob": 0.3} | objective)
    return PretrainTask(
        objective, TOWER, generator, SPECIAL, layout=layout, shared_embeddings=shared, faithful=faithful
    )


def make_rows(rows=4):
    """[CLS] 8 words [SEP] [CLS] words [SEP], then padding, more of it in later rows."""
    ids = np.random.RandomState(0).randint(5, VOCABULARY, (rows, LENGTH)).astype(np.int32)
    ids[:, [0, 10]], ids[:, 9] = CLS, SEP
    for row in range(rows):
        ids[row, 19 - row], ids[row, 20 - row :] = SEP, PAD
    return ids


IDS = make_rows()
KEYS = jax.random.split(jax.random.key(3), 4)


# -- masking ----------------------------------------------------------------------------------------------------------


def test_only_words_are_chosen_and_unknown_ones_too():
    row = np.array([CLS, UNK, UNK, MASK, 7, SEP, UNK, CLS, UNK, SEP] + [PAD] * 10, np.int32)
    keys = jax.random.split(jax.random.key(0), 200)
    prepared = prepare(make_task(), np.tile(row, (200, 1)), keys)
    slots, used = np.asarray(prepared["slots"]), np.asarray(prepared["used"])
    assert used.sum(1).tolist() == [3] * 200  # 0.3 · 10 tokens
    assert set(slots[used].tolist()) == {1, 2, 4, 6, 8}


@functools.cache
def masked_words(rows=3000, **objective):
    """(chosen words as shown to the generator, the words themselves) of many rows."""
    keys = jax.random.split(jax.random.key(0), rows)
    ids = np.random.RandomState(1).randint(5, VOCABULARY, (rows, LENGTH)).astype(np.int32)
    ids[:, 0] = CLS
    prepared = jax.device_get(prepare(make_task(**objective), ids, keys))
    place = np.arange(rows)[:, None], prepared["slots"]
    used = prepared["used"]
    return prepared["masked"][place][used], prepared["ids"][place][used], prepared["hidden"][used], prepared


def test_by_default_85_percent_are_masked_and_15_percent_kept_and_none_is_random():
    o = ObjectiveConfig()
    assert (o.mask_prob, o.keep_prob, o.random_prob, o.temperature, o.disallow_correct) == (0.15, 0.15, 0.0, 1.0, False)
    shown, words, hidden, prepared = masked_words()
    assert len(words) == 3000 * 6
    masked = shown == MASK
    assert masked.mean() == pytest.approx(0.85, abs=0.0135)  # five standard deviations of 18,000
    assert (shown[~masked] == words[~masked]).all() and (hidden == masked).all()
    # nothing but the chosen places is touched
    assert (prepared["masked"] != prepared["ids"]).sum() == masked.sum()


def test_berts_80_10_10_is_keep_01_and_random_01():
    shown, words, hidden, _ = masked_words(keep_prob=0.1, random_prob=0.1)
    masked, kept = shown == MASK, shown == words
    # a random word of 50 is [MASK] or the word itself once in fifty
    assert masked.mean() == pytest.approx(0.8 + 0.1 / 50, abs=0.015)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 50, abs=0.0115)
    random_words = shown[~masked & ~kept]
    assert len(random_words) / len(shown) == pytest.approx(0.1 * 48 / 50, abs=0.011)
    assert random_words.min() == 0 and random_words.max() == VOCABULARY - 1
    assert (hidden == masked).all()


def test_faithful_draws_with_replacement_and_the_default_does_not():
    def repeats(**options):
        prepared = prepare(make_task(**options), np.tile(IDS, (50, 1)), jax.random.split(jax.random.key(0), 200))
        slots, used = np.asarray(prepared["slots"]), np.asarray(prepared["used"])
        return sum(len(set(row[use].tolist())) < use.sum() for row, use in zip(slots, used, strict=True))

    assert repeats() == 0
    assert 80 < repeats(faithful=True) < 190  # 5 or 6 of 14 to 16: about two rows of three


def test_a_rows_mask_is_a_function_of_its_key_alone():
    together = prepare(make_task(), IDS, KEYS)
    turned = prepare(make_task(), IDS[::-1].copy(), KEYS[::-1])
    for name in ("masked", "slots", "used", "dropout_seed"):
        assert (together[name] == turned[name][::-1]).all()


@pytest.mark.parametrize("faithful", [False, True])  # then a position may come twice, and counts twice
def test_weights_are_over_used_slots_and_over_real_tokens_with_cls_and_sep(faithful):
    prepared = prepare(make_task(faithful=faithful), IDS, KEYS)
    real, used = IDS != PAD, np.asarray(prepared["used"])
    assert real.sum() == 20 + 19 + 18 + 17 and used.sum() == 6 + 6 + 5 + 5
    assert (places(jax.device_get(prepared)).sum() < 22) == faithful
    np.testing.assert_allclose(prepared["slot_weight"], used / 22, rtol=2e-6)
    np.testing.assert_allclose(prepared["token_weight"], real / 74, rtol=2e-6)


def test_denominators_are_the_counts_plus_a_millionth():
    ids = np.zeros((4, LENGTH), np.int32)
    ids[0, :2] = [7, SEP]  # round(0.6) = 1 slot, 2 tokens
    prepared = prepare(make_task(), ids, KEYS)
    # float32 has steps of 6e-8 below 1
    assert np.asarray(prepared["slot_weight"]).max() == pytest.approx(1 - 1e-6, abs=1e-7)
    assert np.asarray(prepared["token_weight"]).max() == pytest.approx(0.5 - 2.5e-7, abs=5e-8)


# -- sampling and labels ----------------------------------------------------------------------------------------------


def always(task, token, score=None):
    """Parameters of a generator that always says `token`, and of a discriminator that always gives one logit."""
    params = jax.tree.map(lambda leaf: leaf, params_of(task))
    head = params["generator"]["head"]
    params["generator"]["head"] = head | {"output_bias": head["output_bias"].at[token].set(1e4)}
    if score is not None:
        output = {"kernel": jnp.zeros((16, 1)), "bias": jnp.full(1, score)}
        params["discriminator"]["head"] = params["discriminator"]["head"] | {"output": output}
    return params


@pytest.mark.parametrize("faithful", [False, True])
def test_every_chosen_place_is_replaced_even_one_that_was_kept_visible(faithful):
    task = make_task(faithful=faithful, keep_prob=1.0)
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    assert (prepared["masked"] == IDS).all() and not prepared["hidden"].any()
    _, arrays = evaluate(task, always(task, 49), prepared)
    expected = np.where(places(prepared), 49, IDS)
    assert np.asarray(arrays["corrupted"]).tolist() == expected.tolist()


def test_a_chosen_place_whose_sample_is_the_original_counts_as_original():
    task = make_task()
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    chosen = places(prepared)
    row, place = np.argwhere(chosen)[0]
    _, arrays = evaluate(task, always(task, int(IDS[row, place])), prepared)
    assert chosen.sum() == 22 and not arrays["replaced"][row, place]
    assert (np.asarray(arrays["replaced"]) == (chosen & (IDS[row, place] != IDS))).all()


def test_the_generator_may_say_special_tokens_and_attention_still_follows_the_original_row():
    """A sampled [CLS] or [PAD] would else start a document or end the row."""
    task = make_task()
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    for token in (PAD, CLS):
        metrics, arrays = evaluate(task, always(task, token), prepared)
        assert (np.asarray(arrays["corrupted"])[places(prepared)] == token).all()
        assert float(metrics["rtd_loss"].weight) == 74


def test_no_gradient_of_the_discriminator_reaches_a_generator_with_embeddings_of_its_own():
    task = make_task(shared=False, generator_weight=0.0)
    _, grads = loss_and_grads(task, params_of(task), prepare(task, IDS, KEYS))
    size = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), grads)
    assert not any(jax.tree.leaves([size["generator"], size["generator_embeddings"]]))
    assert all(jax.tree.leaves([size["discriminator"], size["embeddings"]]))


def test_with_shared_embeddings_the_discriminator_moves_these_and_nothing_else_of_the_generator():
    task = make_task(generator_weight=0.0)
    _, grads = loss_and_grads(task, params_of(task), prepare(task, IDS, KEYS))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(grads["generator"]))
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(grads["embeddings"]))


# -- losses and metrics -----------------------------------------------------------------------------------------------


def sigmoid_cross_entropy(logit, label):
    return np.where(label, np.logaddexp(0, -logit), np.logaddexp(0, logit))


@pytest.fixture(scope="module")
def evaluated():
    """A task, its prepared batch, and what its evaluation gives; the first half of the chosen words come out right."""
    task = make_task()
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    metrics, arrays = jax.device_get(evaluate(task, params_of(task), prepared))
    return task, prepared, means(metrics), arrays


def test_the_generators_loss_is_the_mean_cross_entropy_over_used_slots(evaluated):
    task, prepared, found, _ = evaluated
    params, ids = params_of(task), jnp.asarray(IDS)
    positions, mask = document_positions(ids, CLS), document_mask(document_index(ids, CLS, PAD))

    @jax.jit
    def logits_of(masked):
        embedded = Embeddings(TOWER).apply({"params": params["embeddings"]}, masked, None, positions)
        word = params["embeddings"]["word"]
        return Generator(SMALL).apply({"params": params["generator"]}, embedded, word, mask, None, positions)

    logits = np.asarray(logits_of(prepared["masked"]), np.float64)[..., :VOCABULARY]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    terms, right, right_hidden = [], [], []
    for row, slot in zip(*np.nonzero(prepared["used"]), strict=True):
        place = prepared["slots"][row, slot]
        terms.append(-log_p[row, place, IDS[row, place]])
        right.append(log_p[row, place].argmax() == IDS[row, place])
        if prepared["masked"][row, place] == MASK:
            right_hidden.append(right[-1])
    assert len(terms) == 22
    assert found["mlm_loss"] == pytest.approx(np.sum(terms) / (22 + 1e-6), rel=1e-4)
    assert found["mlm_accuracy"] == pytest.approx(np.mean(right))
    assert found["masked_accuracy"] == pytest.approx(np.mean(right_hidden))


def test_the_discriminators_figures_are_over_all_real_tokens(evaluated):
    _, prepared, found, arrays = evaluated
    real = IDS != PAD
    score, label = np.float64(arrays["score"][real]), (arrays["corrupted"] != IDS)[real]
    flagged = score > 0
    assert 0 < label.sum() < 74 and 0 < flagged.sum() < 74 and 0 < (flagged & label).sum()
    assert found["rtd_loss"] == pytest.approx(sigmoid_cross_entropy(score, label).sum() / (74 + 1e-6), rel=1e-5)
    assert found["rtd_accuracy"] == pytest.approx((flagged == label).mean())
    assert found["rtd_precision"] == pytest.approx((flagged & label).sum() / flagged.sum())
    assert found["rtd_recall"] == pytest.approx((flagged & label).sum() / label.sum())
    assert found["replaced_share"] == pytest.approx(label.mean())
    assert found["sampled_accuracy"] == pytest.approx(1 - label.sum() / 22)


def test_the_total_is_the_weighted_sum_of_both():
    """Logits of the discriminator are 1 everywhere, and all samples are one word, so its loss is known."""
    assert (ObjectiveConfig().generator_weight, ObjectiveConfig().discriminator_weight) == (1.0, 50.0)
    task = make_task(generator_weight=0.5, discriminator_weight=10.0)
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    loss, metrics = loss_of(task, always(task, 49, 1.0), prepared)
    found = means(metrics)
    replaced = (places(prepared) & (IDS != 49)).sum()
    rtd = (replaced * math.log(1 + math.exp(-1)) + (74 - replaced) * math.log(1 + math.e)) / 74
    assert found["rtd_loss"] == pytest.approx(rtd, rel=1e-5)
    assert float(loss) == pytest.approx(0.5 * found["mlm_loss"] + 10.0 * rtd, rel=1e-5)


def test_the_loss_of_an_evaluation_is_weighed_like_that_of_training():
    arrays = {
        "hidden_token": np.array([[5, 6]]),
        "real": np.ones((1, 2), bool),
        "score": np.float32([[1, 0]]),
        "replaced": np.array([[True, False]]),
    }
    measured = {"mlm_loss": 3.0, "rtd_loss": 0.2, "masked_accuracy": 0.5}
    assert make_task().summarize(measured, arrays)["loss"] == pytest.approx(3 + 50 * 0.2)
    task = make_task(generator_weight=0.5, discriminator_weight=10.0)
    assert task.summarize(measured, arrays)["loss"] == pytest.approx(0.5 * 3 + 10 * 0.2)
    assert task.summarize(measured, arrays)["rtd_auc"] == 1.0 and task.score({"loss": 2.0}) == -2.0


def test_a_logit_of_exactly_zero_says_original():
    task = make_task()
    metrics, _ = evaluate(task, always(task, 49, 0.0), prepare(task, IDS, KEYS))
    found = {name: (float(mean.total), float(mean.weight)) for name, mean in metrics.items()}
    originals = 74 - found["rtd_recall"][1]
    assert found["rtd_recall"][0] == 0 and found["rtd_recall"][1] > 0  # none is found
    assert found["rtd_precision"] == (0, 0)  # for none is flagged
    assert found["rtd_accuracy"] == (originals, 74)
    assert means({"rtd_loss": metrics["rtd_loss"]})["rtd_loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("layout", ["packed", "segments"])
def test_a_fresh_model_starts_at_ln_v_plus_50_ln_2(layout):
    task = make_task(layout=layout)
    params = jax.jit(lambda: task.init(jax.random.key(0), {"ids": IDS}))()
    loss, metrics = loss_of(task, params, prepare(task, IDS, KEYS))
    assert means(metrics)["mlm_loss"] == pytest.approx(math.log(VOCABULARY), rel=0.02)  # not ln 128: padding is out
    assert float(loss) == pytest.approx(math.log(VOCABULARY) + 50 * math.log(2), rel=0.02)


def test_a_row_of_padding_counts_nothing_and_a_batch_of_them_is_zero_not_nan():
    task = make_task()
    (loss, metrics), grads = loss_and_grads(task, params_of(task), prepare(task, IDS * 0, KEYS))
    assert float(loss) == 0 and not any(mean.weight for mean in metrics.values())
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(grads))


def test_masked_lm_alone_has_no_discriminator_and_its_loss_is_the_cross_entropy():
    objective = ObjectiveConfig(kind="mlm", mask_prob=0.3)
    task = PretrainTask(objective, TOWER, TOWER, SPECIAL, "packed")
    params = params_of(task)
    assert set(params) == {"embeddings", "generator"}
    assert params["generator"]["encoder"]["layer_0"]["up"]["kernel"].shape == (16, 32)
    loss, metrics = loss_of(task, params, prepare(task, IDS, KEYS))
    assert set(metrics) == {"mlm_loss", "mlm_accuracy", "masked_accuracy"}
    assert float(loss) == pytest.approx(means(metrics)["mlm_loss"], rel=1e-5)
    figures = task.summarize({"mlm_loss": 2.0, "masked_accuracy": 0.5}, {"hidden_token": np.array([[5, 5, -1, 6]])})
    assert figures["loss"] == 2.0 and "rtd_auc" not in figures


def test_a_batch_in_bfloat16_has_float32_losses():
    half = {"compute_dtype": "bfloat16"}
    task = dataclasses.replace(
        make_task(),
        discriminator=dataclasses.replace(TOWER, **half),
        generator=dataclasses.replace(SMALL, **half),
    )
    loss, _ = loss_of.eval_shape(task, params_of(task), prepare(task, IDS, KEYS))
    metrics, arrays = evaluate.eval_shape(task, params_of(task), prepare(task, IDS, KEYS))
    assert {loss.dtype, arrays["score"].dtype} == {jnp.dtype("float32")}
    assert {part.dtype for part in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


# -- the rows of a batch may be cut anywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_loss_and_gradients_add_up_over_every_cut_of_the_prepared_rows_dropout_on(evaluated, rows):
    task, prepared, plain, _ = evaluated
    params = params_of(task)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    call = jax.jit(gradients, static_argnums=(0, 3, 4), compiler_options=FAST_COMPILE)
    (whole_loss, whole_metrics), whole_grads = loss_and_grads(task, params, prepared)
    assert abs(plain["mlm_loss"] + 50 * plain["rtd_loss"] - float(whole_loss)) > 1e-3  # dropout is on
    grads, loss, metrics = call(task, params, prepared, mesh, rows)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(metrics), jax.tree.leaves(whole_metrics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def at_once(task, rows):
    return dataclasses.replace(task, objective=dataclasses.replace(task.objective, vocabulary_rows=rows))


@pytest.mark.parametrize("rows", [1, 3])  # of 4 rows 3 are no divisor; 2 are the next
def test_loss_and_gradients_are_the_same_where_the_vocabulary_is_taken_in_chunks(evaluated, rows):
    task, prepared, _, _ = evaluated
    params = params_of(task)
    (whole_loss, whole_metrics), whole_grads = loss_and_grads(task, params, prepared)
    (loss, metrics), grads = loss_and_grads(at_once(task, rows), params, prepared)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    assert means(metrics) == pytest.approx(means(whole_metrics), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def largest_logits(task, prepared):
    """The most values over the vocabulary (of 128 with padding) that an array of the step holds."""
    jaxpr = jax.make_jaxpr(jax.grad(task.loss, has_aux=True))(params_of(task), prepared)
    shapes = re.findall(r"f32\[([\d,]+),128\]", str(jaxpr))
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


def test_no_more_logits_are_held_at_once_than_those_of_a_chunk(evaluated):
    task, prepared, _, _ = evaluated
    assert largest_logits(task, prepared) == 4 * SLOTS
    assert largest_logits(at_once(task, 1), prepared) == SLOTS


# -- figures of an evaluation -----------------------------------------------------------------------------------------


def test_the_best_guess_without_context_is_the_most_frequent_hidden_word():
    task = PretrainTask(ObjectiveConfig(kind="mlm"), TOWER, TOWER, SPECIAL, "packed")
    hidden = np.array([[7, 7, 9, -1], [7, -1, 8, -1]])  # 7 three times, 8 and 9 once
    figures = task.summarize({"mlm_loss": 1.0, "masked_accuracy": 0.7}, {"hidden_token": hidden})
    assert figures["unigram_accuracy"] == pytest.approx(0.6)
    assert figures["unigram_loss"] == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2)))


LEARNED = {"masked_accuracy": 0.5, "unigram_accuracy": 0.1, "rtd_auc": 0.9, "rtd_recall": 0.4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"masked_accuracy": 0.11}, ["unigram level"]),
        ({"rtd_auc": 0.5}, ["majority class"]),
        ({"rtd_recall": 0.0}, ["majority class"]),
        ({"rtd_recall": float("nan")}, ["majority class"]),
    ],
)
def test_what_did_not_learn_is_said_in_words(change, words):
    found = make_task().diagnose(LEARNED | change)
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))
