import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.tokenizer import SPECIALS, Tokenizer
from electrax.inference.classifier import Classifier
from electrax.models.encoder import EncoderConfig
from electrax.tasks.classify import ClassifyTask
from tests.fixtures.compilations import compilations
from tests.fixtures.types import unchecked_types
from tests.fixtures.weights import random_params

WORDS = "the cat dog sat ran on mat red and far".split()
MAX_LENGTH = 12  # between two lengths that batches are padded to
CLASSES = ("bad", "fair", "good")
TEXTS = ["the cat sat", "the dog ran far", "the red mat", ("the cat", "the dog sat"), ("dog", "and cat"), ""]
SAID = [2, 0, 1, 1, 2, 0]  # by a head that is solved for, with logit 3 for the class


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(SPECIALS + WORDS), encoding="utf-8")
    return Tokenizer.load(path)


def ids_of(tokenizer, text):
    texts = (text,) if isinstance(text, str) else text
    ids = [tokenizer.cls_id]
    for part in texts:
        ids += [*tokenizer.encode(part)[0], tokenizer.sep_id]
    return jnp.asarray([ids], jnp.int32)


@pytest.fixture(scope="module")
def task(tokenizer):
    encoder = EncoderConfig(
        vocab_size=tokenizer.vocab_size, layers=1, width=32, heads=2, feed_forward=32, embedding_width=8,
        max_length=MAX_LENGTH,
    )  # fmt: skip
    return ClassifyTask(encoder, tokenizer.pad_id, tokenizer.sep_id, kind="classes", classes=CLASSES)


@pytest.fixture(scope="module")
def params(task, tokenizer):
    """Of the encoder, with a head that gives TEXTS the logits 3 for the class in SAID and 0 for the others."""
    params = random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 8), np.int32)})))
    hidden = jax.jit(task.hidden)
    # each text alone, without padding
    first = np.concatenate([hidden(params, ids_of(tokenizer, text))[:, 0] for text in TEXTS]).astype(np.float64)
    kernel = np.linalg.lstsq(first, 3.0 * np.eye(3)[SAID], rcond=None)[0]
    return params | {"head": {"output": {"kernel": jnp.float32(kernel), "bias": jnp.zeros(3)}}}


@pytest.fixture(scope="module")
def classifier(params, tokenizer, task):
    return Classifier(params, tokenizer, task, MAX_LENGTH)


def made(classifier, columns, **changes):
    """Another head: some of the columns of the solved one."""
    output = {"kernel": classifier.params["head"]["output"]["kernel"][:, columns], "bias": jnp.zeros(len(columns))}
    task = dataclasses.replace(classifier.task, **changes)
    return Classifier(classifier.params | {"head": {"output": output}}, classifier.tokenizer, task, MAX_LENGTH)


LIKELY, OTHER = math.exp(3) / (math.exp(3) + 2), 1 / (math.exp(3) + 2)


def test_logits_are_those_of_each_text_without_padding(classifier):
    rows = [(text,) if isinstance(text, str) else text for text in TEXTS]
    np.testing.assert_allclose(classifier.logits(rows), 3 * np.eye(3)[SAID], atol=2e-3)


def test_every_text_or_pair_gets_its_label_in_order_with_the_probability_of_each(classifier):
    for order in (range(6), [5, 3, 1, 0, 2, 4]):
        found = classifier.predict([TEXTS[i] for i in order])
        assert [row["label"] for row in found] == [CLASSES[SAID[i]] for i in order]
        for row, i in zip(found, order, strict=True):
            expected = {name: LIKELY if k == SAID[i] else OTHER for k, name in enumerate(CLASSES)}
            assert row["probabilities"] == pytest.approx(expected, abs=1e-3)
            assert row["probability"] == row["probabilities"][row["label"]]
            assert sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-12)


def test_a_text_gets_the_same_prediction_alone_and_among_many(classifier):
    many = TEXTS * 30 + ["the cat and the dog sat on the red mat"] * 100  # more than a batch of each length
    together = classifier.predict(many)
    assert len(together) == 280
    for place in (0, 4, 5, 179, 180, 279):
        [alone] = classifier.predict([many[place]])
        assert together[place]["label"] == alone["label"]
        assert together[place]["probabilities"] == pytest.approx(alone["probabilities"], rel=1e-4)


def test_after_warming_up_nothing_is_compiled(params, tokenizer, task):
    fresh = Classifier(params, tokenizer, task, MAX_LENGTH)
    assert fresh.warm_up() == 6  # rows of 8 and of 12 tokens in three sizes of batches each
    with compilations() as found:
        for texts in (TEXTS[:1], TEXTS, TEXTS * 60):
            fresh.predict(texts)
    assert not found


def test_a_long_text_counts_as_its_beginning_and_of_a_long_pair_the_longer_is_cut(classifier):
    words = [WORDS[i % 10] for i in range(50)]
    long, cut = " ".join(words), " ".join(words[:10])
    longer, shorter = classifier.predict([long, cut])
    assert longer["probabilities"] == pytest.approx(shorter["probabilities"], rel=1e-5)
    pair, cut_pair = classifier.logits([("red mat", long), ("red mat", " ".join(words[:7]))])
    np.testing.assert_allclose(pair, cut_pair, rtol=1e-5)


def test_a_regression_gives_the_number_in_its_own_unit(classifier):
    found = made(classifier, [2], kind="number", classes=(), scale=5.0).predict(TEXTS[:3])
    assert [set(row) for row in found] == [{"value"}] * 3
    assert [row["value"] for row in found] == pytest.approx([15, 0, 0], abs=0.01)


def test_several_labels_are_those_with_a_probability_above_a_half(classifier):
    labels = made(classifier, [0, 1, 2], kind="labels")
    labels.params["head"]["output"]["bias"] = jnp.float32([-1, 1, -4])
    found = labels.predict(TEXTS[:3])
    assert [row["labels"] for row in found] == [["fair"], ["bad", "fair"], ["fair"]]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert found[1]["probabilities"] == pytest.approx(
        {"bad": sigmoid(2), "fair": sigmoid(1), "good": sigmoid(-4)}, abs=1e-3
    )


def test_a_choice_is_the_number_of_the_likeliest_text_after_the_context(classifier):
    chooser = made(classifier, [1], kind="choice", classes=("0", "1"))
    rows = [("dog", "and cat", "the mat"), ("the cat", "far", "red", "the dog sat"), ("the cat", "the dog sat", "far")]
    found = chooser.predict(rows)
    for row, choice in zip(rows, found, strict=True):
        logits = np.float64([made(classifier, [1], kind="number").logits([(row[0], text)])[0, 0] for text in row[1:]])
        shares = np.exp(logits) / np.exp(logits).sum()
        assert choice["probabilities"] == pytest.approx(shares.tolist(), rel=1e-3)
        assert choice["choice"] == int(np.argmax(shares))
        assert choice["probability"] == choice["probabilities"][choice["choice"]]
    assert found[1]["probabilities"][2] / found[1]["probabilities"][0] == pytest.approx(
        found[2]["probabilities"][0] / found[2]["probabilities"][1], rel=1e-3
    )  # whatever other choices there are


@pytest.mark.parametrize("kind", ["classes", "number", "labels", "choice"])
def test_nothing_gives_nothing(classifier, kind):
    columns = {"number": [0], "choice": [0]}.get(kind, [0, 1, 2])
    assert made(classifier, columns, kind=kind).predict([]) == []


def test_what_is_no_text_or_pair_is_an_error(classifier):
    for row, count in ((("a", "b", "c"), 3), ((), 0)):
        with pytest.raises(UserError, match=f"predict: expected a text or a pair of texts, not {count} texts"):
            classifier.predict(["the cat", row])
    chooser = made(classifier, [0], kind="choice")
    for row, count in (("the cat", 1), (("the cat", "sat"), 2)):
        with pytest.raises(UserError, match=f"predict: expected a context and at least two choices, not {count} texts"):
            chooser.predict([row])


@pytest.mark.parametrize(
    "row, message",
    [
        (None, "row 1, found None"),
        (3, "row 1, found 3"),
        (("a", None), "row 1, place 1, found None"),
        ("\ud83d", "row 1, found half a surrogate pair"),
    ],
)
def test_a_row_that_holds_no_text_is_an_error(classifier, row, message):
    with unchecked_types(), pytest.raises(UserError, match=f"^predict: expected text in {message}$"):
        classifier.predict(["the cat", row])


def test_one_text_in_place_of_a_list_is_an_error(classifier):
    with pytest.raises(UserError, match="predict: expected a list of texts, not one text"):
        classifier.predict("the cat sat")
