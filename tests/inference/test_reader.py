import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from electrax.config import UserError
from electrax.data.encoded import RowBatches
from electrax.data.examples import Answer, QuestionExample
from electrax.data.tokenizer import Tokenizer
from electrax.data.windows import make_windows
from electrax.inference.reader import Reader
from electrax.models.encoder import EncoderConfig
from electrax.tasks.answer import AnswerTask
from tests.fixtures.compilations import compilations
from tests.fixtures.types import unchecked_types
from tests.fixtures.weights import random_params

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] who what sat ran the cat dog on mat red and far cafe 東 京 , . in".split()
MAX_LENGTH, STRIDE, MAX_QUERY = 14, 4, 3
TOWER = EncoderConfig(
    vocab_size=len(WORDS), layers=1, width=32, heads=2, feed_forward=64, embedding_width=32, max_length=MAX_LENGTH
)
LONG = "the cat sat on the red mat and the dog ran far in the 東京 and the cat ran on and on"
QUESTIONS = [
    ("a", "who sat", "the cat sat on the red mat"),
    ("b", "who ran", LONG),
    ("c", "what ran far", "The  dog, 😀 ran in the Café"),
    ("d", "who", "mat"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def task(tokenizer):
    return AnswerTask(TOWER, tokenizer.pad_id, tokenizer.sep_id, beam=4)


@pytest.fixture(scope="module")
def params(task):
    batch = {"ids": np.zeros((1, MAX_LENGTH), np.int32)}
    return random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), batch)))


@pytest.fixture(scope="module")
def reader(task, params, tokenizer):
    return Reader(params, tokenizer, task, MAX_LENGTH, STRIDE, MAX_QUERY)


def test_answers_are_those_of_an_evaluation_with_the_same_weights(reader, task, params, tokenizer):
    examples = [QuestionExample("f", id, question, context, ()) for id, question, context in QUESTIONS]
    windows = make_windows(tokenizer, examples, MAX_LENGTH, STRIDE, MAX_QUERY)
    assert len(windows.rows) > len(examples)
    batch = windows.rows.batch(np.arange(len(windows.rows)), MAX_LENGTH, {"ids": tokenizer.pad_id})
    arrays = jax.device_get(jax.jit(task.beams)(params, batch["ids"]))
    expected = dataclasses.replace(task, windows=windows).predictions(arrays)
    for (id, found), prediction in zip(reader.answer_batch(QUESTIONS), expected, strict=True):
        assert (id, found.text, found.start, found.end) == tuple(prediction[k] for k in ("id", "text", "start", "end"))
        assert found.probability == pytest.approx(prediction["n_best"][0]["probability"], rel=1e-3)
        assert found.null_score == pytest.approx(prediction["null_score"], rel=1e-3, abs=1e-4)


def test_a_question_is_answered_alike_alone_and_among_others(reader):
    for (_, question, context), (_, among) in zip(QUESTIONS, reader.answer_batch(QUESTIONS), strict=True):
        alone = reader.answer(question, context)
        assert alone[:3] == among[:3]
        assert alone[3:5] == pytest.approx(among[3:5], rel=1e-4, abs=1e-5)
        assert context[alone.start : alone.end] == alone.text != ""
        assert 0 < alone.probability <= 1


def test_a_score_above_the_threshold_withholds_the_answer_where_there_may_be_none(reader, task, params, tokenizer):
    _, question, context = QUESTIONS[0]
    given = reader.answer(question, context)
    v2 = dataclasses.replace(task, no_answer=True)

    def answer(task, null_threshold):
        task = dataclasses.replace(task, null_threshold=null_threshold)
        return Reader(params, tokenizer, task, MAX_LENGTH, STRIDE, MAX_QUERY).answer(question, context)

    assert answer(v2, given.null_score + 0.1)[:5] == pytest.approx(given[:5])
    withheld = answer(v2, given.null_score - 0.1)
    assert withheld[:3] == ("", 0, 0)
    assert withheld.probability == pytest.approx(1 / (1 + math.exp(-given.null_score)), rel=1e-5)
    assert answer(task, given.null_score - 0.1)[:5] == pytest.approx(given[:5])


@pytest.mark.parametrize("context", ["  ", "\u200b"])
def test_a_context_without_a_word_is_an_error(reader, context):
    with pytest.raises(UserError, match=re.escape(f"answer: expected a context with a word, found {context!r}")):
        reader.answer("who", context)


@pytest.mark.parametrize(
    "question, context, message",
    [
        (None, "the cat", "expected text in the question, found None"),
        ("who", None, "expected text in the context, found None"),
        ("who", "\ud83d", "expected text in the context, found half a surrogate pair"),
    ],
)
def test_what_is_no_text_is_an_error(reader, question, context, message):
    with unchecked_types(), pytest.raises(UserError, match=f"^answer: {message}$"):
        reader.answer(question, context)


def test_an_endless_stream_of_questions_is_answered_as_it_comes(reader):
    stream = ((str(i), "who sat", "the cat sat") for i in itertools.count())
    found = list(itertools.islice(reader.answer_batch(stream), 3))
    assert [id for id, _ in found] == ["0", "1", "2"]
    assert found[0][1][:5] == pytest.approx(found[2][1][:5])
    assert list(reader.answer_batch([])) == []


@pytest.mark.parametrize("style", ["joint", "plain"])
def test_a_trained_head_gives_the_answers_it_was_shown_with_their_characters(tokenizer, style):
    def example(id, question, context, answer):
        answers = (Answer(answer, context.rindex(answer)),) if answer else ()
        return QuestionExample("f", id, question, context, answers, impossible=not answer)

    examples = [
        example("1", "who sat", "The  cat, 😀 sat on the red mat", "cat"),
        example("2", "what sat on", "the dog sat on the red mat", "red mat"),
        example("3", "who ran", "the mat ran far and the red Café in 東京 ran", "Café in 東京"),
        example("4", "what", "the dog and the cat ran", ""),
    ]
    windows = make_windows(tokenizer, examples, MAX_LENGTH, STRIDE, MAX_QUERY)
    rows = RowBatches.of(windows.rows, len(windows.rows), {"ids": tokenizer.pad_id}, shapes=1)
    quiet = dataclasses.replace(TOWER, dropout=0.0, attention_dropout=0.0)
    # the plain null score is a difference from the best answer, so that 0 is where both are as likely
    null_threshold = {"joint": -2.75, "plain": 0.0}[style]
    task = AnswerTask(quiet, tokenizer.pad_id, tokenizer.sep_id, rows, rows, style=style, no_answer=True)
    batch = jax.tree.map(jnp.asarray, task.train_batch(0))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(params):
        prepared = task.prepare(batch, jax.random.split(jax.random.key(0), len(batch["ids"])))

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: task.loss(p, prepared)[0])(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=150)

    (params, _), losses = train(jax.jit(lambda: task.init(jax.random.key(0), batch))())
    assert float(losses[-1]) < 0.05 < 1 < float(losses[0])
    task = dataclasses.replace(task, null_threshold=null_threshold)
    reader = Reader(params, tokenizer, task, MAX_LENGTH, STRIDE, MAX_QUERY)
    questions = [(e.id, e.question, e.context) for e in examples]
    for example, (id, found) in zip(examples, reader.answer_batch(questions), strict=True):
        answer = example.answers[0] if example.answers else Answer("", 0)
        assert (id, found.text, found.start) == (example.id, answer.text, answer.start)
        assert found.end == answer.start + len(answer.text)
        assert found.probability > 0.8


def test_after_warming_up_nothing_is_compiled(task, params, tokenizer):
    fresh = Reader(params, tokenizer, task, MAX_LENGTH, STRIDE, MAX_QUERY)
    assert fresh.warm_up() == 6  # windows of 8 and of 14 tokens in three sizes of batches each
    with compilations() as found:
        for questions in (QUESTIONS[:1], QUESTIONS * 30):
            list(fresh.answer_batch(questions))
    assert not found
