import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.config import UserError
from electrax.data.encoded import RowBatches, TokenRows
from electrax.data.examples import TaggedExample
from electrax.data.words import word_padding
from electrax.models.encoder import EncoderConfig
from electrax.tasks.tag import TagTask, label_words, tag_set
from electrax.training.evaluate import make_evaluate
from electrax.training.sharding import MeshConfig, make_mesh
from tests.fixtures.weights import random_params

PAD, CLS, SEP, LENGTH = 0, 2, 3, 12
CONFIG = EncoderConfig(
    vocab_size=40, layers=1, width=16, heads=2, feed_forward=32, embedding_width=8, max_length=LENGTH, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
BIOES = ("B-PER", "E-PER", "I-PER", "O", "S-PER")
B, E, I, O, S = range(5)  # noqa: E741
TASK = TagTask(CONFIG, PAD, SEP, tags=BIOES, scheme="IOB2", max_length=LENGTH, metric="f1")
PLAIN = dataclasses.replace(TASK, tags=("ADJ", "NOUN", "VERB"), scheme=None, metric="accuracy")
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def make_batch():
    """Two rows of 2 and 1 words and one that only fills the batch."""
    ids = np.array([[CLS, 10, 11, 12, SEP, PAD], [CLS, 13, SEP, PAD, PAD, PAD], [PAD] * 6], np.int32)
    label = np.array([[-1, 2, -1, 0, -1, -1], [-1, 1, -1, -1, -1, -1], [-1] * 6], np.int32)
    return {"ids": ids, "label": label, "word": label, "sentence": np.array([0, 1, 0], np.int32),
            "weight": np.float32([1, 1, 0])}  # fmt: skip


KEYS = jax.random.split(jax.random.key(1), 3)


@functools.cache
def params_of(task):
    return random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), make_batch())))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def loss_of(task, params, batch):
    return task.loss(params, task.prepare(batch, KEYS))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def logits_of(task, params, ids):
    return task.logits(params, {"ids": ids})


# -- the loss ---------------------------------------------------------------------------------------------------------


def numpy_losses(logits):
    """Of the three words, by hand."""
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-log_probs[0, 1, 2], -log_probs[0, 3, 0], -log_probs[1, 1, 1]]


@pytest.mark.parametrize("faithful, reduce", [(False, np.mean), (True, np.sum)])
def test_the_loss_is_the_mean_over_words_or_the_references_sum(faithful, reduce):
    task = dataclasses.replace(PLAIN, faithful=faithful)
    loss, found = loss_of(task, params_of(task), make_batch())
    losses = numpy_losses(logits_of(task, params_of(task), make_batch()["ids"]))
    assert float(loss) == pytest.approx(reduce(losses), rel=1e-5)
    assert found["label_loss"].value() == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(found["label_loss"].weight) == float(found["accuracy"].weight) == 3


def test_the_logits_are_one_layer_on_the_hidden_states():
    params, ids = params_of(PLAIN), jnp.asarray(make_batch()["ids"])
    hidden = np.asarray(jax.jit(PLAIN.hidden, compiler_options=FAST_COMPILE)(params, ids))
    layer = params["head"]["output"]
    expected = hidden @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    np.testing.assert_allclose(logits_of(PLAIN, params, ids), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_of_parts_of_the_prepared_rows_adds_up():
    task = dataclasses.replace(PLAIN, encoder=dataclasses.replace(CONFIG, dropout=0.3, attention_dropout=0.3))
    prepared = jax.jit(task.prepare)(make_batch(), KEYS)
    loss = jax.jit(lambda params, rows: task.loss(params, rows)[0], compiler_options=FAST_COMPILE)
    rows = [{name: values[i : i + 1] for name, values in prepared.items()} for i in range(3)]
    parts = [float(loss(params_of(task), row)) for row in rows]
    assert sum(parts) == pytest.approx(float(loss(params_of(task), prepared)), rel=1e-5) and parts[2] == 0


def test_a_batch_without_words_has_loss_zero_and_not_nan():
    batch = make_batch()
    batch["label"] = np.full_like(batch["label"], -1)
    loss, found = loss_of(PLAIN, params_of(PLAIN), batch)
    assert float(loss) == 0 and float(found["label_loss"].weight) == 0


def test_tokens_have_type_0_or_as_in_the_reference_1():
    params = params_of(PLAIN)
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["embeddings"]["type"] = params["embeddings"]["type"].at[1].add(jnp.arange(8.0))
    for faithful in (False, True):
        task = dataclasses.replace(PLAIN, faithful=faithful)
        before, after = (logits_of(task, p, make_batch()["ids"]) for p in (params, changed))
        assert np.allclose(before, after, atol=1e-4) is not faithful


def test_the_head_has_dropout_but_not_in_the_references_form():
    """With hidden states that are a constant whatever is dropped before the last norm."""
    dropping = dataclasses.replace(PLAIN, encoder=dataclasses.replace(CONFIG, dropout=0.5))
    params = jax.tree.map(lambda leaf: leaf, params_of(dropping))
    norm = params["discriminator"]["encoder"]["layer_0"]["output_norm"]
    norm |= {"scale": jnp.zeros(16), "bias": jnp.arange(16.0)}
    for faithful in (False, True):
        task = dataclasses.replace(dropping, faithful=faithful)
        loss, found = loss_of(task, params, make_batch())
        losses = numpy_losses(logits_of(task, params, make_batch()["ids"]))
        assert np.isclose(found["label_loss"].value(), np.mean(losses), rtol=1e-4) == faithful


# -- evaluation -------------------------------------------------------------------------------------------------------


def rows_of(sentences):
    """Token rows of (sentence number, ids of words, labels), one token a word."""
    ids = [[CLS, *words, SEP] for _, words, _ in sentences]
    label = [[-1, *labels, -1] for _, _, labels in sentences]
    word = [[-1, *range(len(labels)), -1] for _, _, labels in sentences]
    rows = TokenRows.of(ids, {"word": word, "label": label})
    return rows.with_fields(sentence=np.array([number for number, _, _ in sentences], np.int32))


TRAINED = [(0, [10, 11, 12, 13], [O, B, E, O]), (1, [14, 15], [S, O]), (2, [15, 16, 17, 18, 19], [B, I, E, O, S]),
           (3, [20, 11], [O, O])]  # fmt: skip


def test_a_tiny_model_learns_four_sentences_by_heart():
    batches = RowBatches.of(rows_of(TRAINED), 4, word_padding(PAD), shapes=2)
    dev = RowBatches.of(rows_of(TRAINED), 2, word_padding(PAD), shapes=2)
    encoder = dataclasses.replace(CONFIG, dropout=0.1, attention_dropout=0.1)
    task = dataclasses.replace(TASK, encoder=encoder, train=batches, dev=dev, batch_size=2)
    params = jax.jit(lambda: task.init(jax.random.key(0), task.train_batch(0)))()
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch, key):
        prepared = task.prepare(batch, jax.random.split(key, 4))
        gradient, found = jax.grad(task.loss, has_aux=True)(params, prepared)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, found

    evaluate = make_evaluate(task, make_mesh(MeshConfig(), jax.devices()[:1]))
    before, arrays = evaluate(params)
    assert task.score(before) < 0.5
    assert arrays["log_probs"].shape == (4, LENGTH, 5) and arrays["label"][1].tolist() == [-1, S, O, *[-1] * 9]
    state = optimizer.init(params)
    for number in range(60):
        params, state, found = step(params, state, task.train_batch(number), jax.random.key(number))
    figures, arrays = evaluate(params)
    assert figures["f1"] == figures["precision"] == figures["recall"] == figures["accuracy"] == 1.0
    assert figures["loss"] < 0.2 and found["label_loss"].value() < 0.3
    assert task.score(figures) == 1.0 and task.diagnose(figures, arrays) == []


def arrays_of(rows):
    """What evaluations give, of rows (sentence, true tags, said tags), each said tag with probability .96."""
    log_probs = np.zeros((len(rows), LENGTH, 5), np.float32)
    label = np.full((len(rows), LENGTH), -1, np.int32)
    for number, (_, true, said) in enumerate(rows):
        label[number, 1 : len(true) + 1] = true
        log_probs[number, 1 : len(said) + 1] = np.log(np.full((len(said), 5), 0.01) + 0.95 * np.eye(5)[said])
    return {"log_probs": log_probs, "label": label, "sentence": np.array([row[0] for row in rows], np.int32)}


def test_precision_recall_and_f1_are_of_spans():
    arrays = arrays_of([(0, [B, E, O, S], [B, E, S, O]), (1, [O, O, S], [O, O, S])])
    figures = TASK.summarize({"loss": 0.5}, arrays)
    # true: 0-2, 3-4 and 2-3 of the second; said: 0-2, 2-3 and 2-3 of the second
    assert figures["precision"] == figures["recall"] == pytest.approx(2 / 3)
    assert figures["f1"] == pytest.approx(2 / 3) and figures["accuracy"] == pytest.approx(5 / 7)
    assert figures["loss"] == 0.5
    assert TASK.tables(arrays) == {"by_type": [
        {"type": "PER", "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3),
         "support": 3}]}  # fmt: skip


def test_a_span_over_the_cut_of_a_long_sentence_is_one_span():
    """One sentence in two rows: words 0-2 count in the first, 3-4 in the second."""
    cut = arrays_of([(0, [O, B, I], [O, B, I]), (0, [E, O], [E, O]), (1, [S], [S])])
    figures = TASK.summarize({}, cut)
    assert figures["f1"] == 1.0 and TASK.tables(cut)["by_type"][0]["support"] == 2


def test_constrained_decoding_finds_the_best_valid_sequence():
    log_probs = np.log(np.float32([[0.1, 0.05, 0.05, 0.35, 0.45], [0.02, 0.9, 0.02, 0.03, 0.03]]))  # S, E one by one
    assert TASK.decode([log_probs])[0].tolist() == [B, E]  # .1 · .9 against .45 · .03
    free = dataclasses.replace(TASK, constrained=False)
    assert free.decode([log_probs])[0].tolist() == [S, E]
    assert TASK.written(np.array([B, E])) == ["B-PER", "I-PER"] and TASK.decode([]) == []


def test_predictions_are_written_in_the_scheme_of_the_data():
    numbers = np.array([O, S, B, I, E])
    for scheme, tags in {
        "IO": ["O", "I-PER", "I-PER", "I-PER", "I-PER"],
        "IOB1": ["O", "I-PER", "B-PER", "I-PER", "I-PER"],
        "IOB2": ["O", "B-PER", "B-PER", "I-PER", "I-PER"],
        "BIOES": ["O", "S-PER", "B-PER", "I-PER", "E-PER"],
    }.items():
        assert dataclasses.replace(TASK, scheme=scheme).written(numbers) == tags
    assert PLAIN.written(np.array([2, 0])) == ["VERB", "ADJ"]


def plain_arrays(true, said):
    log_probs = np.full((1, LENGTH, 3), -9, np.float32)
    log_probs[0, np.arange(len(said)), said] = -0.1
    label = np.full((1, LENGTH), -1, np.int32)
    label[0, : len(true)] = true
    return {"log_probs": log_probs, "label": label, "sentence": np.zeros(1, np.int32)}


def test_plain_tags_have_an_accuracy_and_figures_by_tag():
    arrays = plain_arrays([0, 1, 1, 0], [0, 1, 0, 0])
    macro_f1 = pytest.approx((0.8 + 2 / 3) / 2)
    assert PLAIN.summarize({"loss": 1.0}, arrays) == {"loss": 1.0, "accuracy": 0.75, "macro_f1": macro_f1}
    tables = PLAIN.tables(arrays)
    assert tables["confusion"] == [
        {"tag": "ADJ", "as ADJ": 2, "as NOUN": 0},
        {"tag": "NOUN", "as ADJ": 1, "as NOUN": 1},
    ]
    assert tables["by_tag"] == [
        {"tag": "ADJ", "precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "support": 2},
        {"tag": "NOUN", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}]  # fmt: skip


@pytest.mark.parametrize("case", range(5))
def test_figures_and_tables_of_plain_tags_are_those_of_sklearn(case):
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, true = np.random.default_rng(case).integers(0, 3, (2, LENGTH))
    arrays = plain_arrays(true, predicted)
    expected = sklearn.f1_score(true, predicted, average="macro", zero_division=0)
    assert PLAIN.summarize({}, arrays)["macro_f1"] == pytest.approx(expected)
    tables, names = PLAIN.tables(arrays), np.array(PLAIN.tags)
    labels = sorted(set(names[predicted]) | set(names[true]))
    rows = [[row[f"as {tag}"] for tag in labels] for row in tables["confusion"]]
    assert rows == sklearn.confusion_matrix(names[true], names[predicted], labels=labels).tolist()
    columns = sklearn.precision_recall_fscore_support(names[true], names[predicted], labels=labels, zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[name] for row in tables["by_tag"]] == pytest.approx(column)


def test_a_tagger_that_says_one_tag_is_said_to_be_stuck():
    stuck = plain_arrays([0, 1, 2], [1, 1, 1])
    assert PLAIN.diagnose({}, stuck) == ["it is stuck at one tag: every word gets 'NOUN'"]
    assert PLAIN.diagnose({}, plain_arrays([1, 1], [1, 1])) == []
    assert PLAIN.diagnose({}, plain_arrays([1, 0], [1, 2])) == []


# -- labels -----------------------------------------------------------------------------------------------------------


def example(*tags):
    return TaggedExample("a.conll, line 5", ("w",) * len(tags), tags)


def test_a_scheme_gives_all_tags_of_bioes_for_every_type():
    assert tag_set([["O", "I-PER"], ["B-PER"]], "IOB1") == BIOES
    assert tag_set([["I-x-y"]], "IO") == ("B-x-y", "E-x-y", "I-x-y", "O", "S-x-y")
    assert tag_set([["B", "I", "O"]], "IOB2") == ("B", "E", "I", "O", "S")
    assert tag_set([["VERB", "NOUN"], ["ADJ", "NOUN"]], None) == ("ADJ", "NOUN", "VERB")


def test_labels_are_the_numbers_of_tags_turned_into_bioes():
    assert label_words([example("I-PER", "B-PER", "I-PER", "I-PER", "O")], BIOES, "IOB1") == [[S, B, I, E, O]]
    assert label_words([example("VERB", "ADJ")], ("ADJ", "VERB"), None) == [[1, 0]]


def test_a_tag_that_is_not_in_the_set_is_named_with_its_place():
    for tags in (("O", "B-LOC"), ("O", "?")):
        with pytest.raises(UserError, match=r"a.conll, line 5: word 2 has the tag .*, expected one of B-PER, E-PER, I"):
            label_words([example(*tags)], BIOES, "IOB2")
    with pytest.raises(UserError, match="a.conll, line 5: expected a tag for every word, found none"):
        label_words([TaggedExample("a.conll, line 5", ("w",), None)], BIOES, "IOB2")
