import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.data.encoded import RowBatches, TokenRows
from electrax.models.encoder import EncoderConfig
from electrax.models.flops import encoder_forward
from electrax.models.heads import OutputHead
from electrax.models.masks import segment_ids
from electrax.tasks.base import Mean
from electrax.tasks.finetune import FinetuneTask
from electrax.training.optim import OptimizerConfig, make_optimizer
from tests.fixtures.weights import random_params

PAD, CLS, SEP, LENGTH = 0, 2, 3, 8
ENCODER = EncoderConfig(
    vocab_size=40, layers=2, width=16, heads=2, feed_forward=32, embedding_width=8, max_length=16, dropout=0.2,
    attention_dropout=0.2,
)  # fmt: skip
FAST_COMPILE = {"xla_backend_optimization_level": 0}


class Squares(FinetuneTask):
    """Two numbers of the first token, whose squares shall be small."""

    def head(self):
        return OutputHead(self.encoder, 2)

    def loss(self, params, prepared):
        body, top = prepared["dropout_seed"].T
        first = self.hidden(params, prepared["ids"], body)[:, 0]
        losses = jnp.sum(jnp.square(self.head().apply({"params": params["head"]}, first, top)), axis=-1)
        return jnp.sum(losses * prepared["share"]), {"label_loss": Mean.of(losses, prepared["weight"])}


TASK = Squares(ENCODER, PAD, SEP)
IDS = np.array([[CLS, 10, 11, SEP, 12, SEP, 0, 0], [CLS, 13, SEP, 0, 0, 0, 0, 0], [CLS, 14, 15, 16, SEP, 17, 18, SEP],
                [CLS, 19, 20, 21, SEP, 22, SEP, 0]], np.int32)  # fmt: skip
KEYS = jax.random.split(jax.random.key(5), 6)


def make_batch(fillers=0):
    """Four rows, and some that only fill the batch."""
    ids = np.concatenate([IDS, np.zeros((fillers, LENGTH), np.int32)])
    return {"ids": ids, "weight": np.float32([1] * 4 + [0] * fillers)}


@functools.cache
def params_of(task=TASK):
    return random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), make_batch())))


def flops_of(rows, **frozen):
    """Of the forward and of a training step of a mean row."""
    batches = RowBatches.of(rows, 2, {"ids": PAD}, 1)
    task = dataclasses.replace(TASK, train=batches, **frozen)
    return task.forward_flops(), task.train_flops()


def test_flops_count_every_text_of_a_row_at_its_own_length():
    forward = {n: n * encoder_forward(ENCODER, n) for n in (3, 5, 8)}
    one = TokenRows.of([[1] * 3, [1] * 5])
    assert flops_of(one)[0] == pytest.approx((forward[3] + forward[5]) / 2)
    choices = dataclasses.replace(TokenRows.of([[1] * 3, [1] * 5, [1] * 8, [1] * 3]), group=2)
    assert flops_of(choices)[0] == pytest.approx((2 * forward[3] + forward[5] + forward[8]) / 2)


def test_what_is_frozen_costs_no_gradient():
    rows, tokens = TokenRows.of([[1] * 8]), 8
    # a layer: queries, keys, values, output and two products of the feed-forward network, then scores and mixing
    layer = tokens * (2 * 16 * (4 * 16 + 2 * 32) + 4 * 8 * 16)
    projection = tokens * 2 * 8 * 16
    forward = 2 * layer + projection
    assert flops_of(rows) == (forward, 3 * forward)
    assert flops_of(rows, freeze_embeddings=True)[1] == 3 * forward - 2 * projection
    # a frozen layer passes the gradient on to the embeddings, unless these are frozen too
    assert flops_of(rows, freeze_layers=1)[1] == 3 * forward - layer
    assert flops_of(rows, freeze_layers=1, freeze_embeddings=True)[1] == 3 * forward - 2 * (projection + layer)


def test_a_frozen_last_layer_that_gives_one_token_costs_that_token():
    class OfFirst(Squares):
        first = 1

    rows = RowBatches.of(TokenRows.of([[1] * 8]), 2, {"ids": PAD}, 1)
    task = OfFirst(ENCODER, PAD, SEP, train=rows, freeze_embeddings=True, freeze_layers=2)
    assert task.train_flops() == pytest.approx(task.forward_flops())


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def loss_and_grads(task, params, batch):
    prepared = task.prepare(batch, KEYS[: len(batch["ids"])])
    return jax.value_and_grad(task.loss, has_aux=True)(params, prepared)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def hidden_of(task, params, ids, types=None):
    return task.hidden(params, ids, None, types)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, LENGTH), (3, 4, LENGTH)], ids=["texts", "choices"])
def test_the_parameters_are_those_of_pretraining_and_a_head(shape):
    params = jax.eval_shape(lambda: TASK.init(jax.random.key(0), {"ids": np.full(shape, 9, np.int32)}))
    assert set(params) == {"embeddings", "discriminator", "head"} and set(params["discriminator"]) == {"encoder"}
    assert set(params["embeddings"]) == {"word", "position", "type", "norm"}
    assert set(params["discriminator"]["encoder"]) == {"embeddings_project", "layer_0", "layer_1"}
    assert params["head"]["output"]["kernel"].shape == (16, 2)


def test_fresh_parameters_follow_the_key():
    init = jax.jit(lambda key: TASK.init(key, make_batch()), compiler_options=FAST_COMPILE)
    first, again, other = (named(init(jax.random.key(seed))) for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    for name in ("embeddings/word", "discriminator/encoder/layer_0/up/kernel", "head/output/kernel"):
        assert (first[name] != other[name]).all()


# -- frozen layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, set()),
        ({"freeze_embeddings": True}, {"embeddings", "embeddings_project"}),
        ({"freeze_layers": 1}, {"layer_0"}),
        ({"freeze_embeddings": True, "freeze_layers": 2}, {"embeddings", "embeddings_project", "layer_0", "layer_1"}),
    ],
    ids=["nothing", "embeddings", "a layer", "all but the head"],
)
def test_what_is_frozen_has_no_gradient_and_no_update_and_all_else_has(changes, frozen):
    task = dataclasses.replace(TASK, **changes)
    params = params_of()
    (loss, _), grads = loss_and_grads(task, params, make_batch())
    (unfrozen, _), _ = loss_and_grads(TASK, params, make_batch())
    assert float(loss) == pytest.approx(float(unfrozen), rel=1e-6)
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0.0, weight_decay=0.1, layer_decay=0.8)
    optimizer = make_optimizer(config, 10, is_frozen=task.is_frozen)
    after = jax.jit(lambda: optax.apply_updates(params, optimizer.update(grads, optimizer.init(params), params)[0]))()
    for name, gradient in named(grads).items():
        still = not frozen.isdisjoint(name.split("/"))
        assert np.any(gradient) != still, name
        assert (named(after)[name] == named(params)[name]).all() == still, name


def test_layers_are_told_by_their_number_and_not_by_its_beginning():
    task = dataclasses.replace(TASK, freeze_layers=2)
    layers = [task.is_frozen(("discriminator", "encoder", f"layer_{i}", "up", "kernel")) for i in (0, 1, 2, 10, 11)]
    assert layers == [True, True, False, False, False]
    assert not task.is_frozen(("head", "output", "kernel")) and not task.is_frozen(("embeddings", "word"))


# -- hidden states ----------------------------------------------------------------------------------------------------


def test_padding_changes_no_hidden_state():
    longer = np.pad(IDS, ((0, 0), (0, 5)), constant_values=PAD)
    for row, size in enumerate([6, 3, 8, 7]):
        alone = hidden_of(TASK, params_of(), IDS[row : row + 1, :size])[0]
        for ids in (IDS, longer):
            np.testing.assert_allclose(hidden_of(TASK, params_of(), ids)[row, :size], alone, rtol=1e-4, atol=1e-5)


def test_the_second_text_of_a_pair_has_type_1_unless_types_are_given():
    pairs = np.where(IDS == PAD, 0, np.cumsum(IDS == SEP, axis=1) - (IDS == SEP) > 0).astype(np.int32)
    assert pairs.tolist()[0] == [0, 0, 0, 0, 1, 1, 0, 0] == segment_ids(jnp.asarray(IDS), SEP, PAD).tolist()[0]
    default = hidden_of(TASK, params_of(), IDS)
    np.testing.assert_array_equal(hidden_of(TASK, params_of(), IDS, pairs), default)
    assert not np.allclose(hidden_of(TASK, params_of(), IDS, np.zeros_like(IDS)), default, atol=1e-3)


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("faithful", "share"), [(False, 0.5), (True, 1.0)])
def test_each_rows_share_of_the_loss_is_that_of_a_mean_or_the_references_sum(faithful, share):
    task = dataclasses.replace(TASK, faithful=faithful)
    prepared = task.prepare({"ids": IDS[:3], "weight": np.float32([1, 0, 1])}, KEYS[:3])
    assert prepared["share"].tolist() == [share, 0, share]
    empty = task.prepare({"ids": IDS[:2], "weight": np.zeros(2, np.float32)}, KEYS[:2])
    assert empty["share"].tolist() == [0, 0]


def test_each_row_has_dropout_seeds_of_its_own_key():
    seeds = TASK.prepare(make_batch(), KEYS[:4])["dropout_seed"]
    assert seeds.shape == (4, 2) and seeds.dtype == jnp.uint32 and len(set(np.asarray(seeds).ravel().tolist())) == 8
    turned = TASK.prepare(make_batch(), KEYS[:4][::-1])["dropout_seed"]
    assert turned.tolist() == seeds[::-1].tolist()


@pytest.mark.parametrize("faithful", [False, True])
def test_the_loss_of_a_batch_is_the_mean_or_the_sum_of_its_rows(faithful):
    task = dataclasses.replace(TASK, faithful=faithful)
    (loss, found), _ = loss_and_grads(task, params_of(), make_batch())
    assert float(loss) == pytest.approx(float(found["label_loss"].total) / (1 if faithful else 4), rel=1e-6)
    assert float(found["label_loss"].weight) == 4


@pytest.mark.parametrize("faithful", [False, True])
def test_rows_that_only_fill_a_batch_change_nothing(faithful):
    """Neither loss nor gradient nor metrics, with dropout on."""
    task = dataclasses.replace(TASK, faithful=faithful)
    (loss, found), grads = loss_and_grads(task, params_of(), make_batch())
    (filled_loss, filled), filled_grads = loss_and_grads(task, params_of(), make_batch(fillers=2))
    assert float(filled_loss) == pytest.approx(float(loss), rel=1e-6)
    assert filled["label_loss"].value() == pytest.approx(found["label_loss"].value(), rel=1e-6)
    for name, gradient in named(filled_grads).items():
        np.testing.assert_allclose(gradient, named(grads)[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_batches_come_from_the_split_in_the_order_of_the_seed():
    rows = TokenRows.of([[CLS, word, SEP] for word in range(10, 30)])
    split = RowBatches.of(rows, 4, {"ids": PAD})
    task = dataclasses.replace(TASK, train=split, dev=split, batch_size=4, seed=3)
    for step in (0, 7):
        expected = rows.tokens["ids"].reshape(20, 3)[split.buckets.train_rows(step, 3)[0]]
        np.testing.assert_array_equal(task.train_batch(step)["ids"], expected)
        np.testing.assert_array_equal(task.train_batch(step, slice(2, 4))["ids"], expected[2:4])
    other = dataclasses.replace(task, seed=4)
    assert (other.train_batch(0)["ids"] != task.train_batch(0)["ids"]).any()
    numbers = [number for _, numbers in task.eval_batches() for number in numbers.tolist()]
    assert sorted(numbers) == list(range(20))


# -- scores -----------------------------------------------------------------------------------------------------------


def test_the_score_is_the_metric_and_of_a_loss_or_an_error_its_negative():
    figures = {"loss": 0.25, "accuracy": 0.5}
    assert dataclasses.replace(TASK, metric="accuracy").score(figures) == 0.5
    assert dataclasses.replace(TASK, metric="loss").score(figures) == -0.25
    assert dataclasses.replace(TASK, metric="mse").score({"mse": 2.0}) == -2.0


def test_a_metric_that_is_not_a_number_is_worse_than_any():
    """As the correlation with a model that says one number everywhere."""
    task = dataclasses.replace(TASK, metric="spearman")
    assert task.score({"spearman": math.nan}) < task.score({"spearman": -1.0})
