import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.tokenizer import SPECIALS, Tokenizer
from electrax.inference import template
from electrax.inference.template import TemplateClassifier
from electrax.models.encoder import EncoderConfig
from electrax.tasks.template import TemplateTask
from tests.fixtures.compilations import compilations
from tests.fixtures.weights import random_params

WORDS = "the cat dog sat ran on mat red and far it was good bad very so .".split()
MAX_LENGTH = 16
CLASSES, LABELS = ("-", "0", "+"), ("very bad", "so so", "good")
TEMPLATE = "{text} it was {label}."
TEXTS = ["the cat sat", "the dog ran far", "", "red mat", "the dog and the cat sat on the mat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(SPECIALS + WORDS), encoding="utf-8")
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def task(tokenizer):
    encoder = EncoderConfig(
        vocab_size=tokenizer.vocab_size, layers=1, width=32, heads=2, feed_forward=32, embedding_width=8,
        max_length=MAX_LENGTH,
    )  # fmt: skip
    return TemplateTask(encoder, tokenizer.pad_id, tokenizer.sep_id, classes=CLASSES)


@pytest.fixture(scope="module")
def classifier(task, tokenizer):
    batch = {"ids": np.zeros((1, 3, 8), np.int32)}
    params = random_params(jax.eval_shape(functools.partial(task.init, batch=batch), jax.random.key(0)))
    return TemplateClassifier(params, tokenizer, task, MAX_LENGTH, LABELS, TEMPLATE)


def test_the_logits_are_the_tasks_of_the_filled_template_without_padding(classifier, task, tokenizer):
    logits = classifier.logits([(text,) for text in TEXTS])
    assert logits.shape == (5, 3) and logits.dtype == np.float32
    for text, row in zip(TEXTS[:2], logits, strict=False):
        for label, logit in zip(LABELS, row, strict=True):
            parts = [tokenizer.encode(part)[0] for part in (f"{text} it was", label, ".")]
            ids = [tokenizer.cls_id, *parts[0], *parts[1], *parts[2], tokenizer.sep_id]
            spans = [0] * (1 + len(parts[0])) + [1] * len(parts[1]) + [0, 0]
            batch = {"ids": jnp.array([[ids]]), "spans": jnp.array([[spans]])}
            assert logit == pytest.approx(float(jax.jit(task.logits)(classifier.params, batch)[0, 0]), abs=1e-5)
    assert np.ptp(logits, axis=0).min() > 1e-2


def test_each_text_gets_a_class_with_the_probabilities_of_all_in_order(classifier):
    logits = classifier.logits([(text,) for text in TEXTS]).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for order in (range(5), [3, 1, 4, 0, 2]):
        found = classifier.predict([TEXTS[i] for i in order])
        for row, i in zip(found, order, strict=True):
            assert row["label"] == CLASSES[int(np.argmax(shares[i]))]
            assert row["probabilities"] == pytest.approx(dict(zip(CLASSES, shares[i], strict=True)), abs=1e-6)


def test_a_long_text_counts_as_its_beginning(classifier):
    words = [WORDS[i % 10] for i in range(40)]
    room = MAX_LENGTH - 2 - len("it was very bad .".split())
    long, cut = classifier.logits([(" ".join(words),), (" ".join(words[:room]),)])
    np.testing.assert_allclose(long, cut, atol=1e-6)


def test_other_classes_and_words_need_no_compilation(classifier, tokenizer, task):
    found = classifier.logits([("the cat sat",)])
    few = TemplateTask(task.encoder, task.pad_id, task.sep_id, classes=("no", "yes"))
    compiled = template._originality._cache_size()
    other = TemplateClassifier(classifier.params, tokenizer, few, MAX_LENGTH, ("so so", "good"), TEMPLATE)
    np.testing.assert_allclose(other.logits([("the cat sat",)]), found[:, 1:], atol=1e-6)
    assert template._originality._cache_size() == compiled


def test_after_warming_up_nothing_is_compiled(classifier):
    assert classifier.warm_up() == 6  # rows of 8 and of 16 tokens in three sizes of batches each
    with compilations() as found:
        for texts in (TEXTS[:1], TEXTS * 40):
            classifier.predict(texts)
    assert not found


def test_bad_labels_and_templates_are_refused_at_once(classifier, tokenizer, task):
    with pytest.raises(UserError, match="labels: expected at least two, not 1"):
        TemplateClassifier(classifier.params, tokenizer, task, MAX_LENGTH, ("good",), TEMPLATE)
    with pytest.raises(UserError, match="template: expected {text} and {label} once"):
        TemplateClassifier(classifier.params, tokenizer, task, MAX_LENGTH, LABELS, "{text}")


def test_no_texts_have_no_classes(classifier):
    assert classifier.predict([]) == []
