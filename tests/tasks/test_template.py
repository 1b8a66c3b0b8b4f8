import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.masks import padding_mask
from electrax.tasks.template import TemplateTask
from tests.fixtures.microbatches import assert_parts_add_up
from tests.fixtures.weights import random_params

PAD, CLS, SEP, LENGTH = 0, 2, 3, 8
ENCODER = EncoderConfig(
    vocab_size=40, layers=2, width=32, heads=2, feed_forward=32, embedding_width=8, max_length=LENGTH
)
STILL = dataclasses.replace(ENCODER, dropout=0.0, attention_dropout=0.0)
CLASSES = ("no", "maybe", "yes")
KEYS = jax.random.split(jax.random.key(0), 8)


def make_task(encoder=STILL, **changes):
    return TemplateTask(encoder, PAD, SEP, classes=CLASSES, **changes)


def make_rows(count=4):
    """Two to four words, then the label's tokens: 31, or 32, or 33 34; the last row only fills the batch."""
    random = np.random.RandomState(0)
    ids, spans = np.zeros((count, 3, LENGTH), np.int32), np.zeros((count, 3, LENGTH), np.int32)
    for row in range(count - 1):
        text = random.randint(5, 30, 2 + row % 3).tolist()
        for place, label in enumerate(([31], [32], [33, 34])):
            filled = [CLS, *text, *label, SEP]
            ids[row, place, : len(filled)] = filled
            spans[row, place, 1 + len(text) : 1 + len(text) + len(label)] = 1
    weight = np.float32([1] * (count - 1) + [0])
    return {"ids": ids, "spans": spans, "label": np.arange(count, dtype=np.int32) % 3, "weight": weight}


@functools.cache
def params_of(task):
    return random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), make_rows())))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(task, params, batch):
    prepared = task.prepare(batch, KEYS[: len(batch["ids"])])
    (loss, found), gradient = jax.value_and_grad(task.loss, has_aux=True)(params, prepared)
    return loss, found, gradient


logits_of = functools.partial(jax.jit, static_argnums=0)(lambda task, params, batch: task.logits(params, batch))


# -- parameters and logits --------------------------------------------------------------------------------------------


def test_the_parameters_are_those_of_a_pretrained_discriminator():
    params = jax.eval_shape(lambda: make_task().init(jax.random.key(0), make_rows()))
    ids = jnp.zeros((1, 4), jnp.int32)
    embedded = jax.eval_shape(Embeddings(STILL).init_with_output, jax.random.key(0), ids)[0]
    whole = jax.eval_shape(Discriminator(STILL).init, jax.random.key(0), embedded, padding_mask(ids == 0))["params"]
    assert set(params) == {"embeddings", "discriminator"}
    assert jax.tree.map(lambda leaf: leaf.shape, params["discriminator"]) == jax.tree.map(
        lambda leaf: leaf.shape, whole
    )


def test_a_logit_is_minus_the_discriminators_mean_over_the_labels_tokens():
    params, rows = params_of(make_task()), make_rows()
    logits = logits_of(make_task(), params, rows)
    assert logits.shape == (4, 3)
    discriminate = jax.jit(
        lambda ids: Discriminator(STILL).apply(
            {"params": params["discriminator"]},
            Embeddings(STILL).apply({"params": params["embeddings"]}, ids),
            padding_mask(ids != PAD),
        )
    )
    for row in range(3):
        replaced = np.asarray(discriminate(rows["ids"][row]))
        start = 1 + 2 + row % 3  # where the label begins
        expected = [-replaced[0, start], -replaced[1, start], -(replaced[2, start] + replaced[2, start + 1]) / 2]
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)
    assert np.ptp(logits[:3]) > 0.1 and (np.asarray(logits[3]) == 0).all()


# -- the loss ---------------------------------------------------------------------------------------------------------


class Given(TemplateTask):
    """With logits for parameters."""

    def logits(self, params, prepared, train=False):
        return params["logits"]


LOGITS = [[2.0, 0.0, -1.0], [0.5, 0.0, 1.0], [1.0, 3.0, 0.0], [9.0, 9.0, 0.0]]


def test_the_loss_wants_the_right_word_original_and_the_others_replaced():
    task = Given(STILL, PAD, SEP, classes=CLASSES)
    prepared = task.prepare(jax.tree.map(jnp.asarray, make_rows()), KEYS[:4])
    loss, found = task.loss({"logits": jnp.float32(LOGITS)}, prepared)
    expected = []
    for logits, right in zip(LOGITS[:3], (0, 1, 2), strict=True):
        probabilities = [1 / (1 + math.exp(-z)) for z in logits]  # of being original
        each = [-math.log(p if place == right else 1 - p) for place, p in enumerate(probabilities)]
        expected.append(sum(each) / 3)
    assert float(loss) == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert found["label_loss"].value() == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert (float(found["accuracy"].total), float(found["accuracy"].weight)) == (1, 3)
    summed, _ = dataclasses.replace(task, faithful=True).loss(
        {"logits": jnp.float32(LOGITS)}, prepared | {"share": prepared["weight"]}
    )
    assert float(summed) == pytest.approx(sum(expected), rel=1e-5)


def test_the_loss_is_torchs_of_the_replaced_logits_of_all_filled_templates():
    torch = pytest.importorskip("torch")
    params, rows = params_of(make_task()), make_rows()
    loss, _, _ = loss_and_gradient(make_task(), params, rows)
    replaced = torch.tensor(-np.asarray(logits_of(make_task(), params, rows))[:3])
    wrong = torch.tensor(1 - np.eye(3, dtype=np.float32)[rows["label"][:3]])
    assert float(loss) == pytest.approx(float(torch.nn.BCEWithLogitsLoss()(replaced, wrong)), rel=1e-5)


def test_tokens_outside_the_label_and_padding_carry_no_loss_of_their_own():
    """The gradient with respect to the logits of all tokens, through a head that is the identity of one feature."""
    task, rows = make_task(), make_rows()

    class Probe(TemplateTask):
        def hidden(self, params, ids, seed=None, types=None):
            return params["hidden"]

    probe = Probe(STILL, PAD, SEP, classes=CLASSES)
    hidden = jnp.asarray(np.random.RandomState(0).standard_normal((12, LENGTH, 32)), jnp.float32)
    params = {"discriminator": params_of(task)["discriminator"], "hidden": hidden}
    _, _, gradient = loss_and_gradient(probe, params, rows)
    touched = np.abs(gradient["hidden"]).max(-1).reshape(4, 3, LENGTH) > 0
    np.testing.assert_array_equal(touched, rows["spans"] == 1)


def test_rows_that_only_fill_the_batch_and_more_padding_change_nothing():
    task, rows = make_task(), make_rows()
    loss, _, gradient = loss_and_gradient(task, params_of(task), rows)
    few = {name: values[:3] for name, values in rows.items()}
    alone, _, expected = loss_and_gradient(task, params_of(task), few)
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)
    for leaf, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-6)


def test_loss_and_gradients_of_single_rows_add_up():
    task = make_task(ENCODER)
    assert_parts_add_up(task, params_of(task), task.prepare(make_rows(), KEYS[:4]))


def test_the_gradient_reaches_every_parameter():
    _, _, gradient = loss_and_gradient(make_task(), params_of(make_task()), make_rows())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, path


def test_dropout_is_on_in_training():
    loss, _, _ = loss_and_gradient(make_task(ENCODER), params_of(make_task()), make_rows())
    still, _, _ = loss_and_gradient(make_task(), params_of(make_task()), make_rows())
    assert abs(float(loss) - float(still)) > 1e-4


def test_what_is_frozen_has_no_gradient_and_the_head_is_never_frozen():
    task = make_task(freeze_embeddings=True, freeze_layers=1)
    _, _, gradient = loss_and_gradient(task, params_of(make_task()), make_rows())
    tower = gradient["discriminator"]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((gradient["embeddings"], tower["encoder"]["layer_0"])))
    assert np.abs(tower["encoder"]["layer_1"]["up"]["kernel"]).max() > 0
    assert np.abs(tower["head"]["output"]["kernel"]).max() > 0


# -- training and evaluation ------------------------------------------------------------------------------------------


def test_a_tiny_model_learns_eight_examples():
    task, rows = make_task(), make_rows(9)
    rows = {name: values[:8] for name, values in rows.items()}
    params = jax.jit(lambda: task.init(jax.random.key(0), rows))()
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        _, _, gradient = loss_and_gradient(task, params, rows)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    means, arrays = jax.jit(task.evaluate)(params, task.prepare(rows, KEYS))
    figures = task.summarize({"loss": means["loss"].value()}, jax.device_get(arrays))
    assert figures["accuracy"] == 1.0 and figures["loss"] < 0.3
    assert sorted(figures) == sorted(task.metrics)
