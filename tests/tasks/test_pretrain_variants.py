"""Electric, and generators that are no masked LM of their own."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.config import UserError
from electrax.experiment.config import DataConfig, PretrainConfig
from electrax.experiment.pretrain import make_task as task_of
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.generator import Generator
from electrax.models.masks import document_index, document_mask, document_positions
from electrax.models.sizes import GeneratorConfig
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from tests.fixtures.pretraining import FAST_COMPILE, evaluate, loss_and_grads, means, params_of, places, prepare

PAD, CLS, SEP, MASK = 0, 1, 2, 3
LENGTH, VOCABULARY = 12, 50
TOWER = EncoderConfig(
    vocab_size=VOCABULARY, layers=1, width=16, heads=2, feed_forward=32, embedding_width=12, max_length=LENGTH
)
SMALL = dataclasses.replace(TOWER, width=8, heads=1, feed_forward=16)

# two documents, a [MASK] that may not be chosen, padding: 41 real tokens, 26 of which may be chosen, and 11 are
IDS = np.random.RandomState(0).randint(5, VOCABULARY, (4, LENGTH)).astype(np.int32)
IDS[:, [0, 7]], IDS[:, [6, 11]], IDS[2, 3] = CLS, SEP, MASK
IDS[1, 10:], IDS[3, 5:] = [SEP, PAD], [SEP] + [PAD] * 6
REAL, CANDIDATES = IDS != PAD, IDS > MASK
KEYS = jax.random.split(jax.random.key(3), 4)


def make_task(kind="electric", generator_kind="two_tower"):
    generator = TOWER if generator_kind == "shared" else SMALL
    special, objective = SpecialIds(PAD, CLS, SEP, MASK), ObjectiveConfig(kind=kind, mask_prob=0.3)
    return PretrainTask(objective, TOWER, generator, special, layout="packed", generator_kind=generator_kind)


def largest(tree):
    return [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST_COMPILE)
def towers_alone(module, config, params, table, ids, read):
    """A tower over the packed rows `read`, with the documents and positions of `ids`; logits everywhere."""
    mask, positions = document_mask(document_index(ids, CLS, PAD)), document_positions(ids, CLS)
    embedded = Embeddings(config).apply({"params": table}, read, None, positions)
    words = (table["word"],) if isinstance(module, Generator) else ()
    return module.apply({"params": params}, embedded, *words, mask, positions=positions)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)[..., :VOCABULARY]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def at(log_p, tokens):
    return np.take_along_axis(log_p, np.asarray(tokens)[..., None], axis=-1)[..., 0]


# -- Electric ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def electric():
    """Its prepared batch, what its evaluation gives, and log-probabilities [B, L, V] of its generator by itself."""
    task = make_task()
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    metrics, arrays = jax.device_get(evaluate(task, params_of(task), prepared))
    params = params_of(task)
    cloze = towers_alone(Generator(SMALL, "two_tower"), TOWER, params["generator"], params["embeddings"], IDS, IDS)
    return prepared, means(metrics), arrays, log_softmax(cloze)


def test_electrics_generator_is_judged_at_every_token_that_may_be_chosen(electric):
    prepared, found, _, log_p = electric
    assert (REAL.sum(), CANDIDATES.sum(), prepared["used"].sum()) == (41, 26, 3 + 3 + 3 + 2)
    np.testing.assert_allclose(prepared["place_weight"], CANDIDATES / (26 + 1e-6), rtol=1e-6)
    assert found["mlm_loss"] == pytest.approx(-at(log_p, IDS)[CANDIDATES].mean(), rel=1e-4)
    right = log_p.argmax(-1) == IDS
    assert found["mlm_accuracy"] == pytest.approx(right[CANDIDATES].mean())
    chosen = places(prepared)
    assert found["masked_accuracy"] == pytest.approx(right[chosen].mean())


def test_electrics_logit_is_the_towers_plus_the_log_odds_of_the_noise(electric):
    """At every place, chosen or not, and for the token that stands there after the replacement."""
    _, _, arrays, log_p = electric
    corrupted, params = arrays["corrupted"], params_of(make_task())
    raw = towers_alone(Discriminator(TOWER), TOWER, params["discriminator"], params["embeddings"], IDS, corrupted)
    assert (corrupted != IDS).any()
    expected = np.asarray(raw) + at(log_p, corrupted) + math.log(0.3 / 0.7)
    np.testing.assert_allclose(arrays["score"][REAL], expected[REAL], rtol=1e-4, atol=1e-4)


def test_electrics_figures_are_of_the_chosen_tokens_over_all_real_ones(electric):
    prepared, found, arrays, _ = electric
    label, score = places(prepared)[REAL], np.float64(arrays["score"][REAL])
    assert label.sum() == 11
    terms = np.where(label, np.logaddexp(0, -score), np.logaddexp(0, score))
    assert found["rtd_loss"] == pytest.approx(terms.mean(), rel=1e-5)
    assert found["rtd_accuracy"] == pytest.approx(((score > 0) == label).mean())
    assert found["rtd_recall"] == pytest.approx((score[label] > 0).mean())
    assert found["replaced_share"] == pytest.approx(11 / 41)


@pytest.mark.parametrize("kind", ["electric", "rtd"])
def test_electric_counts_a_sample_that_equals_the_original_as_replaced_and_electra_does_not(kind):
    task = make_task(kind)
    prepared = jax.device_get(prepare(task, IDS, KEYS))
    chosen = places(prepared)
    row, place = np.argwhere(chosen)[0]
    token = int(IDS[row, place])
    params = jax.tree.map(lambda leaf: leaf, params_of(task))
    bias = params["generator"]["head"]["output_bias"].at[token].set(1e4)  # it always says that token
    params["generator"]["head"] = params["generator"]["head"] | {"output_bias": bias}
    metrics, arrays = jax.device_get(evaluate(task, params, prepared))
    assert arrays["corrupted"][row, place] == token
    assert (arrays["replaced"] == (chosen if kind == "electric" else chosen & (IDS != token))).all()
    assert means(metrics)["sampled_accuracy"] == pytest.approx((chosen & (IDS == token)).sum() / 11)


def test_electrics_total_is_the_generators_mean_and_50_times_the_discriminators():
    task = make_task()
    (loss, metrics), _ = loss_and_grads(task, params_of(task), prepare(task, IDS, KEYS))
    found = means(metrics)
    assert float(loss) == pytest.approx(found["mlm_loss"] + 50 * found["rtd_loss"], rel=1e-5)


def without(prepared, *weights):
    """The prepared batch with some of its losses taken out."""
    return prepared | {name: jnp.zeros_like(prepared[name]) for name in weights}


def test_no_gradient_of_electrics_discriminator_passes_through_the_generators_probabilities():
    task = make_task()
    _, grads = loss_and_grads(task, params_of(task), without(prepare(task, IDS, KEYS), "place_weight"))
    assert not any(largest(grads["generator"]))
    assert all(largest([grads["discriminator"], grads["embeddings"]]))


def test_a_fresh_electric_model_starts_where_all_tokens_are_equally_likely():
    """Then the logit of each token is log(1 / V) + log(p / (1 - p))."""
    task = make_task()
    params = jax.jit(lambda: task.init(jax.random.key(0), {"ids": IDS}))()
    metrics = means(evaluate(task, params, prepare(task, IDS, KEYS))[0])
    score = -math.log(VOCABULARY) + math.log(0.3 / 0.7)
    expected = (11 * math.log1p(math.exp(-score)) + 30 * math.log1p(math.exp(score))) / 41
    assert metrics["mlm_loss"] == pytest.approx(math.log(VOCABULARY), rel=0.03)
    assert metrics["rtd_loss"] == pytest.approx(expected, rel=0.03)


def test_rows_of_padding_are_zero_and_not_nan_in_electric():
    task = make_task()
    (loss, metrics), grads = loss_and_grads(task, params_of(task), prepare(task, IDS * 0, KEYS))
    assert float(loss) == 0 and not any(mean.weight for mean in metrics.values())
    assert not any(largest(grads))


def test_electrics_loss_adds_up_over_the_rows():
    task = make_task()
    prepared = prepare(task, IDS, KEYS)
    whole = loss_and_grads(task, params_of(task), prepared)[0][0]
    upper = jnp.array([True, True, False, False])
    halves = [
        loss_and_grads(
            task,
            params_of(task),
            prepared | {name: jnp.where(rows[:, None], prepared[name], 0) for name in ("place_weight", "token_weight")},
        )[0][0]
        for rows in (upper, ~upper)
    ]
    assert float(sum(halves)) == pytest.approx(float(whole), rel=1e-5)


def test_electrics_gradients_are_the_same_where_the_vocabulary_is_taken_in_chunks():
    task = make_task()
    prepared, chunked = prepare(task, IDS, KEYS), dataclasses.replace(task.objective, vocabulary_rows=2)
    (whole_loss, _), whole = loss_and_grads(task, params_of(task), prepared)
    (loss, _), grads = loss_and_grads(dataclasses.replace(task, objective=chunked), params_of(task), prepared)
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


# -- a two-tower generator --------------------------------------------------------------------------------------------


def test_nothing_is_masked_out_for_a_two_tower_generator_and_all_it_predicts_is_hidden_from_it():
    prepared = jax.device_get(prepare(make_task("rtd"), IDS, KEYS))
    assert (prepared["masked"] == IDS).all() and (prepared["hidden"] == prepared["used"]).all()


def test_with_electra_it_is_judged_at_the_chosen_tokens_which_it_reads_in_the_original_row():
    task = make_task("rtd")
    params, prepared = params_of(task), jax.device_get(prepare(task, IDS, KEYS))
    metrics, arrays = jax.device_get(evaluate(task, params, prepared))
    cloze = towers_alone(Generator(SMALL, "two_tower"), TOWER, params["generator"], params["embeddings"], IDS, IDS)
    log_p = log_softmax(cloze)
    assert means(metrics)["mlm_loss"] == pytest.approx(-at(log_p, IDS)[places(prepared)].mean(), rel=1e-4)
    raw = towers_alone(
        Discriminator(TOWER), TOWER, params["discriminator"], params["embeddings"], IDS, arrays["corrupted"]
    )
    np.testing.assert_allclose(arrays["score"][REAL], np.asarray(raw)[REAL], rtol=1e-4, atol=1e-4)


# -- one encoder for both ---------------------------------------------------------------------------------------------


def test_a_shared_generator_is_the_discriminators_encoder_with_a_head_of_its_own():
    task = make_task("rtd", "shared")
    params, prepared = params_of(task), jax.device_get(prepare(task, IDS, KEYS))
    assert set(params["generator"]) == {"head"} and set(params["discriminator"]) == {"encoder", "head"}
    metrics, _ = evaluate(task, params, prepared)
    whole = {"encoder": params["discriminator"]["encoder"], "head": params["generator"]["head"]}
    log_p = log_softmax(towers_alone(Generator(TOWER), TOWER, whole, params["embeddings"], IDS, prepared["masked"]))
    assert means(metrics)["mlm_loss"] == pytest.approx(-at(log_p, IDS)[places(prepared)].mean(), rel=1e-4)


@pytest.mark.parametrize("head", ["generator", "discriminator"])
def test_both_losses_train_a_shared_encoder(head):
    task = make_task("rtd", "shared")
    other = {"generator": "token_weight", "discriminator": "slot_weight"}[head]
    _, grads = loss_and_grads(task, params_of(task), without(prepare(task, IDS, KEYS), other))
    assert all(largest(grads["discriminator"]["encoder"]["layer_0"]))
    trained = {tower: any(largest(grads[tower]["head"])) for tower in ("generator", "discriminator")}
    assert trained == {tower: tower == head for tower in trained}


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "generator_kind"), [("electric", "two_tower"), ("rtd", "two_tower"), ("rtd", "shared")]
)
def test_a_few_steps_on_one_batch_lower_both_losses(kind, generator_kind):
    task = make_task(kind, generator_kind)
    prepared = prepare(task, IDS, KEYS)
    params = jax.jit(lambda: task.init(jax.random.key(0), {"ids": IDS}))()
    optimizer = optax.adam(3e-3)
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(20):
        (_, metrics), grads = loss_and_grads(task, params, prepared)
        updates, state = update(grads, state)
        params = optax.apply_updates(params, updates)
        seen.append(means(metrics))
    for name in ("mlm_loss", "rtd_loss"):
        assert seen[-1][name] < 0.9 * seen[0][name], name


def test_flops_of_a_step_follow_the_generator_and_what_it_predicts():
    """By hand: a token's layer 8D² + 4LD + 4DF and projection 2ED, heads 2D² + 2D and 2DE + 2E · 128, times three."""
    large = 2 * 12 * 16 + 8 * 256 + 4 * 12 * 16 + 4 * 16 * 32
    small = 2 * 12 * 8 + 8 * 64 + 4 * 12 * 8 + 4 * 8 * 16
    detector, table = 2 * 256 + 2 * 16, 2 * 12 * 128
    two, one = table + 2 * (2 * 8) * 12, table + 2 * 16 * 12
    rows = 3 * 5  # of five rows; 3 = int(0.305 · 12) slots
    assert make_task().flops(5, 12) == rows * (12 * (2 * small + large + detector) + 12 * two)
    assert make_task("rtd").flops(5, 12) == rows * (12 * (2 * small + large + detector) + 3 * two)
    assert make_task("rtd", "shared").flops(5, 12) == rows * (12 * (2 * large + detector) + 3 * one)


@pytest.mark.parametrize(
    ("objective", "generator", "message"),
    [
        (
            {"kind": "electric"},
            {},
            'objective.kind "electric" predicts every token from the text around it, which generator.kind "masked" '
            'cannot, as it sees that token; set generator.kind "two_tower"',
        ),
        ({"kind": "electric"}, {"kind": "shared"}, 'which generator.kind "shared" cannot'),
        (
            {"kind": "electric", "mask_prob": 1.0},
            {"kind": "two_tower"},
            'objective.mask_prob must lie above 0 and below 1 for objective.kind "electric", not 1.0',
        ),
        (
            {"kind": "mlm"},
            {"kind": "two_tower"},
            'objective.kind "mlm" trains one LM alone, of generator.kind masked or causal or hybrid, not "two_tower"',
        ),
    ],
)
def test_an_objective_that_its_generator_cannot_serve_is_an_error(objective, generator, message):
    config = PretrainConfig(
        workdir="runs/any",
        steps=1,
        objective=ObjectiveConfig(**objective),
        generator=GeneratorConfig(**generator),
        data=DataConfig(max_length=32),
    )
    with pytest.raises(UserError) as caught:
        task_of(config, 50, {"pad": 0, "cls": 1, "sep": 2, "mask": 3}, None)
    assert message in str(caught.value)


def test_a_config_names_the_objective_and_the_generator():
    config = PretrainConfig(
        workdir="runs/any", steps=1, objective=ObjectiveConfig("electric"), generator=GeneratorConfig("two_tower")
    )
    task = task_of(config, 50, {"pad": 0, "cls": 1, "sep": 2, "mask": 3}, None)
    assert task.electric and task.two_tower and task.detects
