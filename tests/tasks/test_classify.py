import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.encoder import EncoderConfig
from electrax.tasks.classify import ClassifyTask
from electrax.training.sharding import MeshConfig, batch_sharding, make_mesh, put_batch
from electrax.training.state import gradients
from tests.fixtures.weights import random_params

PAD, CLS, SEP, LENGTH = 0, 2, 3, 8
ENCODER = EncoderConfig(
    vocab_size=40, layers=1, width=16, heads=2, feed_forward=32, embedding_width=8, max_length=LENGTH
)
FAST_COMPILE = {"xla_backend_optimization_level": 0}
KINDS = {
    "classes": {"kind": "classes", "classes": ("no", "maybe", "yes")},
    "labels": {"kind": "labels", "classes": ("a", "b")},
    "number": {"kind": "number", "scale": 5.0},
    "choice": {"kind": "choice", "classes": ("0", "1", "2")},
}


def make_task(kind="classes", **changes):
    return ClassifyTask(ENCODER, PAD, SEP, **KINDS[kind], **changes)


def test_the_encoder_gives_the_state_of_cls_alone():
    task = make_task()
    params = jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": np.ones((1, LENGTH), np.int32)}))
    states = jax.eval_shape(task.hidden, params, jax.ShapeDtypeStruct((5, LENGTH), np.int32))
    assert states.shape == (5, 1, ENCODER.width)


# -- losses of given logits -------------------------------------------------------------------------------------------


class Given(ClassifyTask):
    """With logits for parameters."""

    def logits(self, params, prepared, train=False):
        return params["logits"]


LOGITS = {
    "classes": [[2.0, 0.0, -1.0], [0.5, 0.0, 1.0], [1.0, 3.0, 0.0], [9.0, 9.0, 0.0]],
    "labels": [[2.0, -1.0], [0.0, 0.5], [-3.0, 1.0], [9.0, 9.0]],
    "number": [[0.5], [-0.25], [1.0], [9.0]],
    "choice": [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [9.0, 9.0, 0.0]],
}
LABELS = {
    "classes": np.int32([0, 2, 0, 0]),
    "labels": np.float32([[1, 0], [1, 1], [0, 0], [1, 0]]),
    "number": np.float32([0.0, 0.25, 0.8, 0.0]),
    "choice": np.int32([1, 1, 2, 1]),
}
WEIGHT = np.float32([1, 1, 1, 0])  # the last row only fills the batch


def cross_entropy(logits, target):
    """Of probabilities `target` with those of `logits`, by row."""
    logits = np.float64(logits)
    return -np.sum(target * (logits - np.log(np.exp(logits).sum(-1, keepdims=True))), axis=-1)


def binary_cross_entropy(logits, target):
    p = 1 / (1 + np.exp(-np.float64(logits)))
    return -np.mean(target * np.log(p) + (1 - target) * np.log(1 - p), axis=-1)


def softened(kind, logits, t):
    z = np.float64(logits) / t
    return 1 / (1 + np.exp(-z)) if kind == "labels" else np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def numpy_losses(kind):
    logits, label = np.float64(LOGITS[kind]), LABELS[kind]
    if kind == "number":
        return (logits[:, 0] - label) ** 2
    if kind == "labels":
        return binary_cross_entropy(logits, label)
    return cross_entropy(logits, np.eye(3)[label])


def prepared_of(task, **fields):
    batch = {"ids": np.zeros((4, LENGTH), np.int32), "weight": WEIGHT, "label": LABELS[task.kind]} | fields
    return task.prepare(jax.tree.map(jnp.asarray, batch), jax.random.split(jax.random.key(0), 4))


def given(kind, **changes):
    return Given(ENCODER, PAD, SEP, **KINDS[kind], **changes)


def loss_of(task, logits=None, **fields):
    logits = jnp.float32(LOGITS[task.kind] if logits is None else logits)
    return task.loss({"logits": logits}, prepared_of(task, **fields))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("faithful", [False, True])
def test_the_loss_is_the_mean_over_rows_or_the_references_sum(kind, faithful):
    loss, found = loss_of(given(kind, faithful=faithful))
    losses = numpy_losses(kind)[:3]
    assert float(loss) == pytest.approx(losses.sum() if faithful else losses.mean(), rel=1e-5)
    assert found["label_loss"].value() == pytest.approx(losses.mean(), rel=1e-5)
    assert set(found) == {"label_loss"} | ({"accuracy"} if kind in ("classes", "choice") else set())


@pytest.mark.parametrize("kind", ["classes", "choice"])
def test_the_training_accuracy_is_of_the_rows_that_count(kind):
    accuracy = loss_of(given(kind))[1]["accuracy"]  # two of three are right
    assert (float(accuracy.total), float(accuracy.weight)) == (2, 3)


def test_known_losses():
    assert numpy_losses("number")[:3].tolist() == pytest.approx([0.25, 0.25, 0.04])
    even = np.zeros((4, 3))
    assert float(loss_of(given("classes"), even)[0]) == pytest.approx(math.log(3))
    assert float(loss_of(given("choice"), even)[0]) == pytest.approx(math.log(3))
    assert float(loss_of(given("labels"), np.zeros((4, 2)))[0]) == pytest.approx(math.log(2))  # not 2 ln 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_row_that_counts_has_loss_zero(kind):
    loss, found = loss_of(given(kind), weight=np.zeros(4, np.float32))
    assert float(loss) == 0 and float(found["label_loss"].weight) == 0


# -- a teacher --------------------------------------------------------------------------------------------------------

TEACHER = {kind: np.float32(logits)[::-1, ::-1] / 2 for kind, logits in LOGITS.items()}
TAUGHT = ["classes", "labels", "choice"]


def teacher_losses(kind, t):
    logits = np.float64(LOGITS[kind])
    entropy = binary_cross_entropy if kind == "labels" else cross_entropy
    return t * t * entropy(logits / t, softened(kind, TEACHER[kind], t))


@pytest.mark.parametrize("kind", TAUGHT)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teachers_part_is_the_cross_entropy_with_its_softened_probabilities_times_t_squared(kind, temperature):
    task = given(kind, teacher_weight=0.3, teacher_temperature=temperature)
    loss, found = loss_of(task, teacher=TEACHER[kind])
    own, taught = numpy_losses(kind)[:3].mean(), teacher_losses(kind, temperature)[:3].mean()
    assert found["teacher_loss"].value() == pytest.approx(taught, rel=1e-5)
    assert found["label_loss"].value() == pytest.approx(own, rel=1e-5)
    assert float(loss) == pytest.approx(0.7 * own + 0.3 * taught, rel=1e-5)


def test_a_teachers_part_of_a_number_is_the_squared_distance():
    task = given("number", teacher_weight=0.5, teacher_temperature=3.0)
    loss, found = loss_of(task, teacher=np.float32([[0.0], [0.25], [1.0], [5.0]]))
    assert found["teacher_loss"].value() == pytest.approx((0.25 + 0.25) / 3)
    assert float(loss) == pytest.approx(0.5 * (0.25 + 0.25 + 0.04) / 3 + 0.5 * 0.5 / 3)


def gradient_of(task, logits, teacher):
    return jax.grad(lambda z: loss_of(task, z, teacher=np.float32(teacher))[0])(jnp.float32(logits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_where_a_student_is_as_its_teacher_nothing_moves_it(kind, temperature):
    task = given(kind, teacher_weight=1.0, teacher_temperature=temperature)
    assert float(jnp.abs(gradient_of(task, LOGITS[kind], LOGITS[kind])).max()) < 1e-6


@pytest.mark.parametrize("kind", TAUGHT)
def test_the_gradient_of_a_teachers_part_does_not_fade_with_the_temperature(kind):
    """T² · (student - teacher) / T of the softened probabilities, so that with a large T it is z - t in the end."""
    for t in (1.0, 4.0):
        task = given(kind, teacher_weight=1.0, teacher_temperature=t)
        difference = softened(kind, LOGITS[kind], t) - softened(kind, TEACHER[kind], t)
        if kind == "labels":
            difference = difference / 2  # a mean over labels
        expected = t * difference * WEIGHT[:, None] / 3
        np.testing.assert_allclose(gradient_of(task, LOGITS[kind], TEACHER[kind]), expected, rtol=1e-4, atol=1e-6)


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_gives_the_loss_without_a_teacher_and_each_rows_logits_and_label(kind):
    task = given(kind, teacher_weight=0.5)
    found, arrays = task.evaluate({"logits": jnp.float32(LOGITS[kind])}, prepared_of(task))
    assert set(found) == {"loss"} and found["loss"].value() == pytest.approx(numpy_losses(kind)[:3].mean(), rel=1e-5)
    np.testing.assert_array_equal(arrays["logits"], np.float32(LOGITS[kind]))
    np.testing.assert_array_equal(arrays["label"], LABELS[kind])


def test_the_figures_of_classes():
    arrays = {"logits": np.float32([[3, 0, 0], [0, 1, 0], [0, 2, 1], [0, 0, 1]]), "label": np.int32([0, 1, 2, 2])}
    figures = make_task().summarize({"loss": 0.5}, arrays)
    # by hand: F1 of the classes 1, 2/3 and 2/3; Matthews (4 · 3 - 5) / √((16 - 6)(16 - 6))
    assert figures == {"loss": 0.5, "accuracy": 0.75, "macro_f1": pytest.approx(7 / 9), "matthews": pytest.approx(0.7)}


def test_two_classes_have_the_f1_of_the_second():
    task = dataclasses.replace(make_task(), classes=("no", "yes"))
    arrays = {"logits": np.float32([[1, 0], [0, 1], [0, 1], [1, 0]]), "label": np.int32([0, 1, 0, 1])}
    figures = task.summarize({}, arrays)
    assert figures["f1"] == 0.5 and figures["accuracy"] == 0.5 and figures["matthews"] == 0.0


def test_the_figures_of_numbers_are_in_their_own_units():
    arrays = {"logits": np.float32([[0.0], [0.4], [1.0]]), "label": np.float32([0.2, 0.4, 0.8])}  # 0, 2, 5 and 1, 2, 4
    figures = make_task("number").summarize({"loss": 0.02}, arrays)
    # deviations from the means 7/3 and 7/3: (-7, -1, 8)/3 and (-4, -1, 5)/3
    assert figures["pearson"] == pytest.approx((28 + 1 + 40) / math.sqrt((49 + 1 + 64) * (16 + 1 + 25)))
    assert figures["spearman"] == pytest.approx(1.0) and figures["loss"] == 0.02
    assert figures["mse"] == pytest.approx((1 + 0 + 1) / 3)


def test_the_figures_of_labels_take_those_with_a_probability_above_a_half():
    arrays = {"logits": np.float32([[2, -1], [0.1, -0.1], [-3, 1]]), "label": np.float32([[1, 0], [1, 1], [0, 0]])}
    figures = make_task("labels").summarize({}, arrays)
    # said a; a; b, where a; a and b; nothing are true
    assert figures["micro_f1"] == pytest.approx(2 * 2 / (3 + 3)) and figures["exact_match"] == pytest.approx(1 / 3)
    assert figures["macro_f1"] == pytest.approx(0.5) and figures["samples_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_the_figures_of_choices():
    arrays = {"logits": np.float32([[0, 1, 0], [2, 0, 0], [0, 0, 1]]), "label": np.int32([1, 1, 2])}
    assert make_task("choice").summarize({}, arrays)["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [("no", "yes"), ("no", "maybe", "yes")], ids=["two", "three"])
def test_every_figure_can_be_the_score(kind, classes):
    classes = () if kind == "number" else classes
    task = dataclasses.replace(make_task(kind), classes=classes)
    logits = np.float32(LOGITS[kind])[:, : max(1, len(classes))]
    label = LABELS[kind][:, : len(classes)] if kind == "labels" else LABELS[kind] % max(2, len(classes))
    figures = task.summarize({"loss": 0.5}, {"logits": logits, "label": label})
    assert sorted(task.metrics) == sorted(figures)
    for name in task.metrics:
        sign = -1 if name in ("loss", "mse") else 1
        assert dataclasses.replace(task, metric=name).score(figures) == sign * figures[name]


def test_the_tables_of_classes_have_a_row_for_each():
    arrays = {"logits": np.float32([[3, 0, 0], [0, 1, 0], [0, 2, 1], [0, 1, 0]]), "label": np.int32([0, 1, 2, 1])}
    tables = make_task().tables(arrays)
    assert tables["by_class"] == [
        {"class": "no", "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1},
        {"class": "maybe", "precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "support": 2},
        {"class": "yes", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
    ]
    assert tables["confusion"] == [
        {"class": "no", "as no": 1, "as maybe": 0, "as yes": 0},
        {"class": "maybe", "as no": 0, "as maybe": 2, "as yes": 0},
        {"class": "yes", "as no": 0, "as maybe": 1, "as yes": 0},
    ]
    assert make_task("number").tables(arrays) == {}
    assert make_task("choice").tables(arrays) == {"confusion": [
        {"choice": "0", "as 0": 1, "as 1": 0, "as 2": 0},
        {"choice": "1", "as 0": 0, "as 1": 2, "as 2": 0},
        {"choice": "2", "as 0": 0, "as 1": 1, "as 2": 0},
    ]}  # fmt: skip


@pytest.mark.parametrize("case", range(5))
def test_the_table_of_labels_is_that_of_sklearn(case):
    sklearn = pytest.importorskip("sklearn.metrics")
    task = make_task("labels")
    predicted, true = np.random.default_rng(case).integers(0, 2, (2, 6, len(task.classes)))
    table = task.tables({"logits": np.float32(predicted - 0.5), "label": np.float32(true)})["by_label"]
    columns = sklearn.precision_recall_fscore_support(true, predicted, zero_division=0)
    assert [row["label"] for row in table] == list(task.classes)
    for name, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[name] for row in table] == pytest.approx(column)


@pytest.mark.parametrize(
    ("kind", "logits", "label", "words"),
    [
        ("classes", [[0, 2, 1], [0, 3, 0]], [0, 1], ["it is stuck at one class: every row gets 'maybe'"]),
        ("classes", [[0, 2, 1], [0, 3, 0]], [1, 1], []),  # and rightly so
        ("classes", [[0, 2, 1], [3, 0, 0]], [2, 1], []),
        ("choice", [[0, 2, 1], [0, 3, 0]], [0, 1], ["it is stuck at one class: every row gets 'choice 1'"]),
        ("number", [[0.5], [0.5004]], [0, 1], ["it gives every row the same number"]),
        ("number", [[0.5], [0.6]], [0, 1], []),
        ("labels", [[-1, -2], [-0.1, -3]], [[1, 0], [0, 1]], ["it gives no row any label"]),
        ("labels", [[-1, -2], [-0.1, 3]], [[1, 0], [0, 1]], []),
    ],
)
def test_what_did_not_train_is_said_in_words(kind, logits, label, words):
    assert make_task(kind).diagnose({}, {"logits": np.float32(logits), "label": np.array(label)}) == words


@pytest.mark.parametrize(
    ("metric", "words"),
    [("spearman", ["its spearman is not a number: every dev row has the same label"]), ("mse", [])],
)
def test_a_correlation_with_labels_that_are_all_the_same_is_said_in_words(metric, words):
    arrays = {"logits": np.float32([[0.5], [0.6]]), "label": np.float32([1, 1])}
    assert make_task("number", metric=metric).diagnose({}, arrays) == words


# -- logits -----------------------------------------------------------------------------------------------------------

IDS = np.array([[CLS, 10, 11, SEP, 12, SEP, 0, 0], [CLS, 13, SEP, 0, 0, 0, 0, 0], [CLS, 14, 15, 16, SEP, 17, 18, SEP],
                [CLS, 19, 20, 21, SEP, 22, SEP, 0], [CLS, 23, 24, SEP, 25, 26, SEP, 0],
                [CLS, 27, 28, SEP, 0, 0, 0, 0]], np.int32)  # fmt: skip


@functools.cache
def params_of(task):
    return random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": IDS})))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def logits_of(task, params, ids):
    return task.logits(params, {"ids": ids})


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def hidden_of(task, params, ids):
    return task.hidden(params, ids)


@pytest.mark.parametrize("kind", ["classes", "labels", "number"])
def test_the_logits_are_the_heads_of_the_first_hidden_state(kind):
    task = make_task(kind)
    params = params_of(task)
    layer = params["head"]["output"]
    expected = np.asarray(hidden_of(task, params, IDS))[:, 0] @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    logits = logits_of(task, params, IDS)
    assert logits.shape == (6, {"classes": 3, "labels": 2, "number": 1}[kind])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_logit_of_a_choice_is_that_of_its_text_alone():
    task = make_task("choice")
    logits = logits_of(task, params_of(task), IDS.reshape(2, 3, LENGTH))
    alone = logits_of(task, params_of(task), IDS[:, None])
    assert logits.shape == (2, 3) and alone.shape == (6, 1)
    np.testing.assert_allclose(logits.ravel(), alone.ravel(), rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training_in_the_encoder_and_in_the_head():
    """In the head: with hidden states that are a constant whatever is dropped before the last norm."""
    task = make_task(faithful=True)
    batch = {"ids": IDS, "weight": np.ones(6, np.float32), "label": np.zeros(6, np.int32)}
    prepared = jax.jit(task.prepare)(batch, jax.random.split(jax.random.key(0), 6))
    train = jax.jit(lambda params, prepared: task.logits(params, prepared, train=True), compiler_options=FAST_COMPILE)
    params = params_of(task)
    still = params_of(dataclasses.replace(task, encoder=dataclasses.replace(ENCODER, dropout=0.0)))
    assert not np.allclose(train(params, prepared), logits_of(task, params, IDS), atol=1e-3)
    norm = {"scale": jnp.zeros(16), "bias": jnp.arange(16.0)}
    layer = still["discriminator"]["encoder"]["layer_0"] | {"output_norm": norm}
    encoder = still["discriminator"]["encoder"] | {"layer_0": layer}
    constant = still | {"discriminator": {"encoder": encoder}}
    logits = np.asarray(train(constant, prepared))
    assert len(np.unique(logits_of(task, constant, IDS).round(3))) == 3  # one row, six times
    assert len(np.unique(logits.round(3), axis=0)) > 3


# -- the rows of a batch may be cut anywhere --------------------------------------------------------------------------


def short_batch(kind):
    """Eight rows, of which the last three only fill the batch."""
    random = np.random.RandomState(0)
    ids = np.concatenate([IDS[:5], np.zeros((3, LENGTH), np.int32)])
    if kind == "choice":
        ids = np.stack([ids, np.roll(ids, 1, axis=0), np.roll(ids, 2, axis=0)], axis=1)
        ids[5:] = 0
    label = {"number": random.rand(8), "labels": random.rand(8, 2) < 0.5}.get(kind, random.randint(0, 3, 8))
    label = label.astype(LABELS[kind].dtype)
    return {"ids": ids, "label": label, "weight": np.float32([1] * 5 + [0] * 3)}


KEYS = jax.random.split(jax.random.key(1), 8)


def run(task, devices, microbatch, batch=None):
    """(gradient, loss, metrics) of the short batch, in NumPy."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])

    def compute(params, batch):
        prepared = jax.lax.with_sharding_constraint(
            task.prepare(batch, KEYS[: len(batch["ids"])]), batch_sharding(mesh)
        )
        return gradients(task, params, prepared, mesh, microbatch)

    batch = put_batch(batch or short_batch(task.kind), mesh)
    return jax.device_get(jax.jit(compute, compiler_options=FAST_COMPILE)(params_of(task), batch))


@functools.cache
def in_one_pass(task):
    return run(task, 1, 8)


def assert_same(found, expected):
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize(("devices", "microbatch"), [(1, 1), (1, 2), (2, 2), (2, 4), (4, 2), (8, 1)])
def test_loss_and_gradient_do_not_depend_on_devices_and_micro_batches(devices, microbatch):
    assert_same(run(make_task(), devices, microbatch), in_one_pass(make_task()))


@pytest.mark.parametrize("kind", ["labels", "number", "choice"])
def test_so_for_every_kind_of_label(kind):
    assert_same(run(make_task(kind), 2, 2), in_one_pass(make_task(kind)))


@pytest.mark.parametrize("kind", ["classes", "choice"])
def test_a_short_last_batch_is_worth_its_rows_and_no_more(kind):
    task = make_task(kind)
    rows = {name: values[:5] for name, values in short_batch(kind).items()}
    assert_same(run(task, 1, 5, rows), in_one_pass(task))
    without = dataclasses.replace(task, encoder=dataclasses.replace(ENCODER, dropout=0.0, attention_dropout=0.0))
    assert abs(run(without, 1, 8)[1] - in_one_pass(task)[1]) > 1e-3  # dropout is on
