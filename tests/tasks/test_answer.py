import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.data.encoded import RowBatches
from electrax.data.examples import Answer, QuestionExample
from electrax.data.tokenizer import Tokenizer
from electrax.data.windows import make_windows
from electrax.experiment.results import at_best_threshold
from electrax.experiment.run import Run
from electrax.models.encoder import EncoderConfig
from electrax.tasks.answer import AnswerTask
from electrax.training.evaluate import make_evaluate
from electrax.training.sharding import MeshConfig, make_mesh
from electrax.training.tracking import Record
from tests.fixtures.microbatches import assert_parts_add_up
from tests.fixtures.weights import random_params

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] who sat where the cat on mat red and ran far ##s cafe 東 京 , .".split()
TOWER = EncoderConfig(
    vocab_size=len(WORDS), layers=1, width=8, heads=2, feed_forward=16, embedding_width=8, max_length=16
)
CONTEXT = "the cat sat on the red mat and ran far"
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # little is computed here and much compiled


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return Tokenizer.load(path)


def question(context=CONTEXT, *texts, id="q", impossible=False, golds=()):
    answers = tuple(Answer(text, context.index(text)) for text in texts)
    return QuestionExample("f.json", id, "who sat", context, answers, impossible, golds)


def make_task(tokenizer, examples, max_length=16, stride=128, **options):
    """With all windows as training and as dev rows."""
    windows = make_windows(tokenizer, examples, max_length, stride, max_query=2)
    batches = RowBatches.of(windows.rows, 2, {"ids": tokenizer.pad_id}) if examples else None
    tower = options.pop("tower", TOWER)
    return AnswerTask(
        tower, tokenizer.pad_id, tokenizer.sep_id, batches, batches, batch_size=2, windows=windows, **options
    )


@functools.cache
def params_of(task):
    batch = {"ids": np.zeros((1, 16), np.int32)}
    return random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), batch)))


def batch_of(task, rows, length=16):
    return task.windows.rows.batch(np.array(rows), length, {"ids": task.pad_id})


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def loss_and_grads(task, params, batch):
    prepared = task.prepare(batch, jax.random.split(jax.random.key(1), batch["ids"].shape[0]))
    return jax.value_and_grad(task.loss, has_aux=True)(params, prepared)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def evaluate(task, params, batch):
    return task.evaluate(params, task.prepare(batch, jax.random.split(jax.random.key(1), batch["ids"].shape[0])))


# -- training ---------------------------------------------------------------------------------------------------------

QUIET = dataclasses.replace(TOWER, dropout=0.0, attention_dropout=0.0)
TRAINED = [question(CONTEXT, "cat"), question("the mat", impossible=True), question("the red mat", "red mat")]


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def expected_losses(task, params, batch):
    """Span loss and classifier loss of each row, in numpy, from the encoder's states."""
    states = np.asarray(jax.jit(task.hidden)(params, jnp.asarray(batch["ids"])), np.float64)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["head"])
    spans, nulls = [], []

    def dense(x, layer):
        return x @ layer["kernel"] + layer.get("bias", 0.0)

    def pair(a, b, layer):
        x = dense(a, layer["first"]) + dense(b, layer["second"])
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return dense(x, layer["output"])[..., 0]

    for h, ids, first, last, impossible in zip(
        states, batch["ids"], batch["start"], batch["end"], batch["impossible"], strict=True
    ):
        separators = np.flatnonzero(ids == task.sep_id)
        allowed = np.zeros(len(ids), bool)
        allowed[0], allowed[separators[0] + 1 : separators[1] + 1] = True, True
        if task.style == "plain":
            start, end = (dense(h, head["output"]) - 1000 * ~allowed[:, None]).T
        else:
            start = dense(h, head["start"])[:, 0] - 1000 * ~allowed
            end = pair(h[first][None], h, head["end"]) - 1000 * ~allowed
            z = pair(h[0], np.exp(log_softmax(start)) @ h, head["answerable"])
            nulls.append(np.log1p(np.exp(z)) - impossible * z)
        spans.append(-(log_softmax(start)[first] + log_softmax(end)[last]) / 2)
    return np.array(spans), np.array(nulls)


@pytest.mark.parametrize("style", ["joint", "plain"])
def test_the_loss_is_that_of_start_and_end_and_half_of_the_classifiers(tokenizer, style):
    task = make_task(tokenizer, TRAINED, tower=QUIET, style=style)
    params, batch = params_of(task), batch_of(task, [0, 1, 2])
    assert [(batch["start"][i], batch["end"][i]) for i in range(3)] == [(5, 5), (0, 0), (5, 6)]
    assert batch["impossible"].tolist() == [0, 1, 0]
    spans, nulls = expected_losses(task, params, batch)
    (loss, found), grads = loss_and_grads(task, params, batch)
    expected = spans + 0.5 * nulls if style == "joint" else spans
    assert float(loss) == pytest.approx(expected.mean(), rel=1e-5)
    assert found["span_loss"].value() == pytest.approx(spans.mean(), rel=1e-5)
    assert ("null_loss" in found) == (style == "joint")
    means, _ = evaluate(task, params, batch)
    assert means["loss"].value() == pytest.approx(expected.mean(), rel=1e-5)
    # biases that move all logits alike have no gradient
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    assert [name for name, leaf in flat.items() if "bias" not in name and float(jnp.abs(leaf).max()) < 1e-6] == []


def test_the_loss_is_a_mean_over_windows_or_faithfully_their_sum_and_fillers_count_for_nothing(tokenizer):
    mean = make_task(tokenizer, TRAINED, tower=QUIET)
    faithful = dataclasses.replace(mean, faithful=True)
    params = params_of(mean)
    spans, nulls = expected_losses(mean, params, batch_of(mean, [0, 2]))
    batch = batch_of(mean, [0, 2, -1])
    (loss, found), _ = loss_and_grads(mean, params, batch)
    (total, _), _ = loss_and_grads(faithful, params, batch)
    assert float(loss) == pytest.approx((spans + 0.5 * nulls).mean(), rel=1e-5)
    assert float(total) == pytest.approx((spans + 0.5 * nulls).sum(), rel=1e-5)
    assert float(found["span_loss"].weight) == 2


@pytest.mark.parametrize("style", ["joint", "plain"])
def test_loss_and_gradients_of_single_windows_add_up(tokenizer, style):
    task = make_task(tokenizer, TRAINED, style=style, no_answer=True)
    prepared = task.prepare(batch_of(task, [0, 1, 2, -1]), jax.random.split(jax.random.key(1), 4))
    assert_parts_add_up(task, params_of(task), prepared)


def test_training_drops_units_of_the_encoder_and_evaluation_does_not(tokenizer):
    task = make_task(tokenizer, TRAINED)
    params, batch = params_of(task), batch_of(task, [0, 1, 2])
    (loss, _), _ = loss_and_grads(task, params, batch)
    quiet = dataclasses.replace(task, encoder=QUIET)
    (undropped, _), _ = loss_and_grads(quiet, params, batch)
    assert abs(float(loss) - float(undropped)) > 1e-3
    assert evaluate(task, params, batch)[0]["loss"].value() == pytest.approx(float(undropped), rel=1e-5)


@pytest.mark.parametrize("style", ["joint", "plain"])
def test_the_beams_of_a_window_depend_neither_on_padding_nor_on_other_windows(tokenizer, style):
    task = make_task(tokenizer, TRAINED, style=style, beam=3)
    params = params_of(task)
    alone = jax.device_get(evaluate(task, params, batch_of(task, [2], length=8))[1])
    among = jax.device_get(evaluate(task, params, batch_of(task, [0, 2]))[1])
    for name in ("start", "end"):
        assert alone[name][0].tolist() == among[name][1].tolist()
    np.testing.assert_allclose(alone["score"][0], among["score"][1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(alone["null"][0], among["null"][1], rtol=1e-4, atol=1e-4)


# -- choosing spans, from beams made by hand --------------------------------------------------------------------------


def arrays_of(task, spans, null):
    """Beams with one end for each start. `spans`: for each window (start, end, score) by place in its row."""
    width = max(map(len, spans))
    start = np.zeros((len(spans), width), np.int32)
    end = np.zeros((len(spans), width, width), np.int32)  # other ends are [CLS], never an answer
    score = np.zeros((len(spans), width, width), np.float32)
    for row, some in enumerate(spans):
        for k, (first, last, value) in enumerate(some):
            start[row, k], end[row, k, 0], score[row, k, 0] = first, last, value
    assert len(task.windows.rows) == len(spans)
    return {"start": start, "end": end, "score": score, "null": np.array(null, np.float32)}


def predict(task, spans, null=None):
    return task.predictions(arrays_of(task, spans, null or [0.0] * len(spans)))


def test_the_best_span_becomes_the_characters_of_the_context(tokenizer):
    task = make_task(tokenizer, [question(id="first"), question("The  Mat ", id="second")])
    first, second = predict(task, [[(4, 5, -2.0), (9, 10, -1.0)], [(4, 5, -3.0)]], [1.5, -4.0])
    best = {"text": "red mat", "start": 19, "end": 26, "score": -1.0}
    share = 1 / (1 + math.exp(-1))
    other = {"text": "the cat", "start": 0, "end": 7, "score": -2.0, "probability": pytest.approx(1 - share)}
    n_best = [best | {"probability": pytest.approx(share)}, other]
    assert first == {"id": "first", **best, "null_score": 1.5, "n_best": n_best}
    assert (second["id"], second["text"], second["start"], second["end"]) == ("second", "The  Mat", 0, 8)
    assert second["null_score"] == -4.0


def test_only_spans_of_the_context_that_run_forward_and_are_short_enough_are_answers(tokenizer):
    task = make_task(tokenizer, [question("the cat sat on the mat")], max_answer=2)  # rows 4 to 9, [SEP] 10
    impossible = [
        (0, 0, 9.0),
        (0, 5, 8.0),
        (1, 2, 7.0),
        (3, 4, 6.0),
        (6, 5, 5.0),
        (4, 6, 4.0),
        (9, 10, 3.0),
        (20, 20, 2.0),
    ]
    (found,) = predict(task, [impossible + [(4, 5, 1.0), (6, 6, 0.5)]])
    assert [(entry["text"], entry["score"]) for entry in found["n_best"]] == [("the cat", 1.0), ("sat", 0.5)]


def test_without_a_possible_span_the_answer_is_empty(tokenizer):
    task = make_task(tokenizer, [question(" "), question("the mat")])
    for found in predict(task, [[(0, 0, 1.0)], [(0, 0, 1.0)]], [0.5, 0.5]):
        assert (found["text"], found["start"], found["end"], found["n_best"]) == ("", 0, 0, [])
        assert found["null_score"] == 0.5


def test_a_span_counts_in_the_window_that_shows_most_around_its_start_only(tokenizer):
    task = make_task(tokenizer, [question()], max_length=10, stride=3)
    # windows of 5 tokens from 0, 3, and 4 from 6; token 4 ("the") has more around it in the second, token 6 ("mat")
    # one to the right in the second and none to the left in the third
    assert task.windows.rows.fields["document"].tolist() == [0, 3, 6]
    (found,) = predict(task, [[(8, 8, 5.0), (7, 7, 0.5)], [(4, 4, 4.0), (5, 6, 1.0)], [(4, 4, 3.0), (6, 6, 2.0)]])
    assert [(e["text"], e["start"]) for e in found["n_best"]] == [("ran", 31), ("the red", 15), ("on", 12)]


def test_the_null_score_is_the_least_of_the_windows_and_for_the_plain_head_less_the_best_span(tokenizer):
    examples = [question(), question("the mat")]
    spans = [[(4, 4, 1.0)], [(6, 6, 2.0)], [(6, 6, 3.0)], [(5, 5, 7.0)]]
    null = [0.5, -1.5, 4.0, 2.0]
    joint = make_task(tokenizer, examples, max_length=10, stride=3)
    assert [found["null_score"] for found in predict(joint, spans, null)] == [-1.5, 2.0]
    plain = dataclasses.replace(joint, style="plain")
    assert [found["null_score"] for found in predict(plain, spans, null)] == [-1.5 - 3.0, 2.0 - 7.0]


def test_n_best_are_different_texts_of_all_windows(tokenizer):
    task = make_task(tokenizer, [question()], max_length=10, stride=3, n_best=3)
    # "the" of the first window and "the" of the second are one text
    (found,) = predict(task, [[(4, 4, 4.0), (5, 5, 1.0)], [(5, 5, 3.0)], [(6, 6, 2.0), (7, 7, 0.5)]])
    assert [(e["text"], e["start"], e["score"]) for e in found["n_best"]] == [
        ("the", 0, 4.0), ("ran", 31, 2.0), ("cat", 4, 1.0),
    ]  # fmt: skip
    weights = np.exp([4.0, 2.0, 1.0])
    assert [e["probability"] for e in found["n_best"]] == pytest.approx(list(weights / weights.sum()))


def test_answers_are_cut_out_of_accents_emoji_chinese_and_repeated_spaces_as_they_stand(tokenizer):
    context = "The  Café, 😀😀 \n 東京  cafe\u0301s"
    task = make_task(tokenizer, [question(context)])
    # [CLS] who sat [SEP] the cafe , [UNK] 東 京 cafe ##s [SEP]
    spans = [(5, 5, 9.0), (7, 7, 8.0), (8, 9, 7.0), (10, 11, 6.0), (5, 8, 5.0), (10, 10, 4.0)]
    (found,) = predict(task, [spans])
    texts = ["Café", "😀😀", "東京", "cafe\u0301s", "Café, 😀😀 \n 東", "cafe\u0301"]
    assert [entry["text"] for entry in found["n_best"]] == texts
    assert all(context[entry["start"] : entry["end"]] == entry["text"] for entry in found["n_best"])


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_questions_that_all_have_answers_ignore_the_null_score(tokenizer):
    examples = [question(CONTEXT, "the cat", "cat sat"), question("the red mat", "mat", golds=("Red mat!",))]
    task = make_task(tokenizer, examples)
    figures = task.summarize({"loss": 2.0}, arrays_of(task, [[(5, 7, 0.0)], [(5, 6, 0.0)]], [9.0, 9.0]))
    # "cat sat on" against "cat sat": 2 of 3 and 2 of 2 words; "red mat" is what counts as right
    assert figures["loss"] == 2.0
    assert figures["exact"] == pytest.approx(50.0)
    assert figures["f1"] == pytest.approx(100 * (0.8 + 1.0) / 2)
    assert task.metric == "f1" and task.score(figures) == figures["f1"]
    assert "best_f1" not in figures and "NoAns_f1" not in figures


def test_where_a_file_says_what_counts_as_right_its_places_do_not(tokenizer):
    task = make_task(tokenizer, [question("the red mat", "mat", golds=("red mat",))])
    figures = task.summarize({"loss": 0.0}, arrays_of(task, [[(6, 6, 0.0)]], [0.0]))
    assert (figures["exact"], figures["f1"]) == (0.0, pytest.approx(100 * 2 / 3))  # "mat" against "red mat"


def test_with_unanswerable_questions_the_threshold_decides_and_the_best_one_is_found(tokenizer):
    examples = [question(CONTEXT, "cat"), question("the red mat", "mat"), question("the cat", impossible=True)]
    task = make_task(tokenizer, examples, no_answer=True)
    assert task.null_threshold == -2.75
    arrays = arrays_of(task, [[(5, 5, 0.0)], [(6, 6, 0.0)], [(5, 5, 0.0)]], [-5.0, -1.0, 3.0])
    figures = task.summarize({}, arrays)
    # at -2.75 the second answer is withheld, though it is right
    assert figures["exact"] == figures["f1"] == pytest.approx(200 / 3)
    assert (figures["HasAns_f1"], figures["NoAns_f1"], figures["HasAns_total"]) == (50.0, 100.0, 2)
    assert (figures["best_f1"], figures["best_f1_thresh"]) == (100.0, -1.0)
    assert (figures["best_exact"], figures["best_exact_thresh"]) == (100.0, -1.0)
    better = dataclasses.replace(task, null_threshold=-1.0).summarize({}, arrays)
    assert better["f1"] == 100.0


def test_questions_that_share_an_id_are_counted_each(tokenizer):
    task = make_task(tokenizer, [question(CONTEXT, "cat", id=""), question("the mat", "mat", id="")])
    figures = task.summarize({}, arrays_of(task, [[(5, 5, 0.0)], [(4, 4, 0.0)]], [0.0, 0.0]))
    assert (figures["total"], figures["exact"]) == (2, 50.0)


def test_an_evaluation_over_batches_of_different_lengths_gives_each_window_its_own_beams(tokenizer):
    examples = [question(CONTEXT, "cat"), question("the mat", "mat"), question("the red mat and the cat", "red mat")]
    task = make_task(tokenizer, examples, max_length=12, stride=3, beam=4, no_answer=True)
    params = params_of(task)
    assert len({length for _, length in task.dev.buckets.eval_rows()}) > 1
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    figures, arrays = make_evaluate(task, mesh)(params)
    assert len(arrays["start"]) == len(task.windows.rows)
    for row in range(len(task.windows.rows)):
        expected = jax.device_get(evaluate(task, params, batch_of(task, [row], 12))[1])
        assert arrays["start"][row].tolist() == expected["start"][0].tolist()
        np.testing.assert_allclose(arrays["score"][row], expected["score"][0], rtol=1e-4, atol=1e-4)
    assert figures == pytest.approx(task.summarize({"loss": figures["loss"]}, arrays))
    assert figures["total"] == 3


def test_a_head_that_is_stuck_is_said_in_words(tokenizer):
    task = make_task(tokenizer, [question(), question("the mat")], no_answer=True)
    stuck = arrays_of(task, [[(5, 5, 0.0)], [(5, 5, 0.0)]], [1.0, 1.0])
    assert task.diagnose({}, stuck) == [
        "it is stuck at one place: every window's answer starts at token 5",
        "it gives every window the same score of having no answer",
    ]
    assert task.diagnose({}, arrays_of(task, [[(5, 5, 0.0)], [(4, 5, 0.0)]], [1.0, 0.0])) == []


def test_a_threshold_above_which_no_question_is_answered_is_said_of_the_task_that_has_it(tokenizer, monkeypatch):
    """Two of three questions have no answer, and the one that has some looks most like them."""
    task = make_task(tokenizer, [question(CONTEXT, "cat"), *[question(impossible=True)] * 2], no_answer=True)
    arrays = arrays_of(task, [[(5, 5, 0.0)], [(4, 5, 0.0)], [(4, 5, 0.0)]], [-4.0, -5.0, -6.0])
    final = Record(1, "eval", task.summarize({"loss": 0.5}, arrays), arrays)
    monkeypatch.setattr("electrax.experiment.results.keep_threshold", lambda workdir, threshold: None)
    run = Run.__new__(Run)
    vars(run).update(task=task, config=SimpleNamespace(workdir="unused"))
    assert task.diagnose({}, arrays) == []
    best, found = at_best_threshold(run, final)
    assert (best.null_threshold, round(found.figures["exact"])) == (-7.0, 67)
    assert best.diagnose({}, arrays) == ["it is stuck at no answer: every question gets none"]


@pytest.mark.parametrize("impossible", [True, False])
def test_no_answer_to_any_question_is_said_in_words_where_one_has_some(tokenizer, impossible):
    first = question(impossible=True) if impossible else question(CONTEXT, "cat")
    task = make_task(tokenizer, [first, question(impossible=True)], no_answer=True, null_threshold=0.0)
    spans = [[(5, 5, 0.0)], [(4, 5, 0.0)]]
    stuck = [] if impossible else ["it is stuck at no answer: every question gets none"]
    assert task.diagnose({}, arrays_of(task, spans, [1.0, 0.5])) == stuck
    assert task.diagnose({}, arrays_of(task, spans, [1.0, 0.0])) == []
