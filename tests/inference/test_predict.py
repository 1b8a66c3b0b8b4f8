"""Lines and tables in, JSON lines out, with models trained for seconds."""

import gzip
import io
import json
import os
import sys
import threading

import jax
import numpy as np
import pytest

import electrax
from electrax.config import UserError
from electrax.inference.batching import TOKENS, batch_tokens
from electrax.inference.predict import PredictConfig, predict_lines
from electrax.tasks.answers import question_figures
from tests.fixtures.finetuning import (
    MODEL,
    NOUNS,
    QUESTIONS,
    REVIEWS,
    call,
    finetuning,
    results_of,
    squad,
    train,
    write,
    write_rows,
)

FAST = {"optimizer": {"learning_rate": 0.01, "layer_decay": 1.0}, "eval": {"every": 1000}}


def predict(*words):
    """The JSON lines of the command."""
    status, output = call("predict", *words)
    assert status == 0
    return [json.loads(line) for line in output.splitlines()]


def from_stdin(monkeypatch, text, *words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text)))
    return predict(*words)


# -- a classifier ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """The work directory of `finetune csv` on two columns, from random weights; three more rows are its dev set."""
    folder = tmp_path_factory.mktemp("reviews")
    write_rows(folder / "reviews.csv", [row for i, row in enumerate(REVIEWS) if i % 7 != 3])
    write_rows(folder / "dev.csv", REVIEWS[3::7])
    words = ["--data.dev", "dev.csv", "--steps=100", "--batch_size=8", "--data.shapes=1", "--eval.every=100"]
    words += [f"--model.{key}={value}" for key, value in MODEL.items()]
    words += ["--optimizer.learning_rate=0.02", "--optimizer.layer_decay=1", "--workdir", folder / "run"]
    status, _ = call("finetune", "csv", "--data.path", folder / "reviews.csv", *words)
    assert status == 0
    return folder / "run"


def test_two_columns_without_pretrained_weights_give_a_classifier_that_is_right(reviews):
    results = results_of(reviews)
    assert (results["score"], results["failed"]) == (1.0, [])
    assert results["confusion"] == [{"class": "no", "as no": 2, "as yes": 0}, {"class": "yes", "as no": 0, "as yes": 1}]


LINES = ["the film was good", "the dog was poor", "", "the house was fine"]
EXPECTED = ["yes", "no", None, "yes"]


def assert_lines(found, where):
    """That the third has an error and the others their labels, in order."""
    assert [line.get("label") for line in found] == EXPECTED
    assert found[2].keys() == {"error"} and where in found[2]["error"] and "expected text" in found[2]["error"]
    for line in found[:2] + found[3:]:
        assert line.keys() == {"label", "probability", "probabilities"}
        assert line["probabilities"].keys() == {"no", "yes"}
        assert line["probability"] == line["probabilities"][line["label"]] == max(line["probabilities"].values()) > 0.8
        assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_a_line_of_text_gives_a_line_in_the_same_order(reviews, tmp_path):
    write(tmp_path / "a.txt", "".join(line + "\n" for line in LINES))
    found = predict(reviews, tmp_path / "a.txt")
    assert_lines(found, "a.txt, line 3: ")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    assert [line.get("label") for line in predict(reviews, tmp_path / "a.txt.gz")] == EXPECTED


def test_a_row_of_a_table_gives_a_line_whatever_other_columns_there_are(reviews, tmp_path):
    write_rows(tmp_path / "a.csv", [(i, line) for i, line in enumerate(LINES)], ("number", "text"))
    assert_lines(predict(reviews, tmp_path / "a.csv"), "a.csv, line 4: ")
    write_rows(tmp_path / "b.tsv", [(line, "?") for line in LINES], ("review", "label"))
    assert_lines(predict(reviews, tmp_path / "b.tsv", "--text", "review"), "b.tsv, line 4: ")
    with pytest.raises(UserError, match="b.tsv: no column 'text'"):
        predict(reviews, tmp_path / "b.tsv")


def test_a_row_that_cannot_be_read_gives_an_error_and_the_rest_go_on(reviews, tmp_path):
    write(tmp_path / "a.csv", 'n,text\n1,the film was good\n2\n3,"the\ndog was poor"\n4,\x00\n5,the cat was fine\n')
    found = predict(reviews, tmp_path / "a.csv")
    assert [line.get("label") for line in found] == ["yes", None, "no", None, "yes"]
    assert "a.csv, line 3: expected 2 cells, found 1" in found[1]["error"]
    assert "a.csv, line 6: expected UTF-8 text, found a NUL byte" in found[3]["error"]
    rows = ['{"text": "the film was good"}', '{"text": "the', '{"text": 3}', '{"text": "the dog was poor"}']
    write(tmp_path / "a.jsonl", "\n".join(rows) + "\n")
    found = predict(reviews, tmp_path / "a.jsonl")
    assert [line.get("label") for line in found] == ["yes", None, None, "no"]
    assert "a.jsonl, line 2: expected one JSON object a line" in found[1]["error"]
    assert "a.jsonl, line 3: expected text in column 'text', found 3" in found[2]["error"]


def test_rows_before_a_failure_of_the_file_are_predicted(reviews, tmp_path):
    write(tmp_path / "a.csv", 'text\nthe film was good\nthe dog was poor\n"the cat was fine\n')
    lines = predict_lines(electrax.load(reviews), PredictConfig(str(reviews), str(tmp_path / "a.csv")), ("text",))
    assert [json.loads(next(lines))["label"] for _ in range(2)] == ["yes", "no"]
    with pytest.raises(UserError, match="a.csv, line 4: expected a cell to end"):
        next(lines)


def test_lines_of_standard_input_are_told_apart_by_their_numbers(reviews, monkeypatch):
    found = from_stdin(monkeypatch, "\n".join(LINES), reviews, "-")
    assert_lines(found, "standard input, line 3: ")
    found = from_stdin(monkeypatch, b"\xff\nthe film was good\r\nthe dog\twas poor\n", reviews, "-")
    assert [line.get("label") for line in found] == [None, "yes", "no"]  # a tab is a space to one text
    assert "standard input, line 1: byte 1: expected UTF-8, found 0xff" in found[0]["error"]
    assert from_stdin(monkeypatch, "", reviews, "-") == []


def test_lines_of_standard_input_are_answered_before_it_ends(reviews, monkeypatch):
    model = electrax.load(reviews)
    model.warm_up(longest=8)
    read, written = os.pipe()
    end = threading.Timer(10, os.close, (written,))  # so that a failure does not wait for ever
    with open(read) as file:
        monkeypatch.setattr(sys, "stdin", file)
        end.start()
        lines = predict_lines(model, PredictConfig(str(reviews), "-"), ("text",))
        for text, label in (("the film was good", "yes"), ("the dog was poor", "no")):
            os.write(written, f"{text}\n".encode())
            assert json.loads(next(lines))["label"] == label
            assert end.is_alive()
        end.cancel()
        os.close(written)
        assert list(lines) == []


def test_rows_beyond_those_that_are_read_together_keep_their_order(reviews, monkeypatch):
    monkeypatch.setattr("electrax.inference.predict.ROWS", 3)
    lines = ["the film was good", "the cat was bad", "", *["the dog was fine"] * 2, "", "", "", "the play was poor"]
    found = from_stdin(monkeypatch, "\n".join(lines), reviews, "-")
    assert [line.get("label") for line in found] == ["yes", "no", None, "yes", "yes", None, None, None, "no"]


def test_the_tokens_of_a_batch_can_be_set_and_change_no_result(reviews, tmp_path):
    source = write(tmp_path / "a.txt", "the film was good\nthe dog was poor\n" * 20)
    whole = predict(reviews, source)
    assert batch_tokens() == TOKENS
    some = predict(reviews, source, "--batch_tokens", "32")
    assert batch_tokens() == 32
    assert [line["label"] for line in some] == ["yes", "no"] * 20
    np.testing.assert_allclose([line["probability"] for line in some], [line["probability"] for line in whole], 1e-5)
    with pytest.raises(UserError, match="batch_tokens must not be negative, but is -1"):
        predict(reviews, source, "--batch_tokens=-1")
    assert predict(reviews, source) == whole
    assert batch_tokens() == TOKENS


def test_letters_beyond_ascii_are_written_as_they_are(tmp_path, reviews):
    status, output = call("predict", reviews, write(tmp_path / "é.txt", "\n"))
    assert (status, "é.txt, line 1" in output) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN"], "predict: expected WORKDIR INPUT"),
        (["RUN", "gone.txt"], "gone.txt: no such file"),
        (["RUN", "a.png"], "a.png: expected a name that ends in"),
        (["gone/for/good", "a.txt"], "gone/for/good: no such file or directory"),
        (["RUN", "a.txt", "--txt", "a"], "unknown key txt; did you mean text?"),
    ],
)
def test_what_cannot_be_predicted_at_all_is_an_error(reviews, words, message):
    with pytest.raises(UserError, match=message):
        predict(*(reviews if word == "RUN" else word for word in words))


def test_a_pretrained_model_predicts_nothing(tmp_path):
    write(tmp_path / "config.toml", 'task = "pretrain"\nworkdir = "any"\nsteps = 1\n')
    with pytest.raises(UserError, match="expected the work directory of a fine-tuning; this is one of a pretraining"):
        predict(tmp_path, write(tmp_path / "a.txt", "the film\n"))


# -- pairs and numbers -------------------------------------------------------------------------------------------------

PAIRS = [(f"the {a}", f"a {b}", 100 * i + 25 * j) for i, a in enumerate(NOUNS[:4]) for j, b in enumerate(NOUNS[:4])]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """The work directory of a regression on pairs, with labels from 0 to 375."""
    folder = tmp_path_factory.mktemp("numbers")
    write_rows(folder / "train.tsv", PAIRS, ("s", "t", "likeness"))
    write_rows(folder / "dev.tsv", PAIRS[::2], ("s", "t", "likeness"))
    data = {"path": str(folder), "text": ["s", "t"], "label": "likeness"}
    train(finetuning(folder / "run", data=data, head={"kind": "number"}, steps=10, **FAST))
    return folder / "run"


def test_a_pair_is_two_texts_with_a_tab_between_them(numbers, tmp_path, monkeypatch):
    lines = "the film\ta story\nthe film\nthe cat\ta dog\ta play\nthe cat\t \nthe cat\ta dog\n"
    found = from_stdin(monkeypatch, lines, numbers, "-")
    assert [list(line) for line in found] == [["value"], ["error"], ["error"], ["error"], ["value"]]
    assert found[2]["error"] == "standard input, line 3: expected 2 texts with a tab between them, found 3"
    assert predict(numbers, write(tmp_path / "a.txt", lines))[4] == found[4]
    write_rows(tmp_path / "a.tsv", [("the film", "a story"), ("the cat", "a dog")], ("s", "t"))
    assert predict(numbers, tmp_path / "a.tsv") == [found[0], found[4]]
    # order matters
    assert from_stdin(monkeypatch, "a dog\tthe cat\n", numbers, "-") != [found[4]]


def test_predicted_numbers_are_in_the_units_of_the_labels(numbers, tmp_path):
    rows = PAIRS[::2]
    found = [line["value"] for line in predict(numbers, write_rows(tmp_path / "a.tsv", rows, ("s", "t", "likeness")))]
    expected = np.array([label for _, _, label in rows])
    assert json.loads((numbers / "head.json").read_text())["scale"] == 375.0
    results = results_of(numbers)
    assert results["metrics"]["mse"] == pytest.approx(np.mean((found - expected) ** 2), rel=1e-4)
    assert results["metrics"]["loss"] == pytest.approx(results["metrics"]["mse"] / 375**2, rel=1e-4)
    assert results["metrics"]["pearson"] == pytest.approx(np.corrcoef(found, expected)[0, 1], abs=1e-3)


def test_a_model_says_how_many_texts_it_expects(numbers, reviews, tmp_path):
    with pytest.raises(UserError, match="^predict: expected a pair of texts, not 1 text$"):
        electrax.load(numbers).predict(["the cat"])
    with pytest.raises(UserError, match="^predict: expected one text, not 2 texts$"):
        electrax.load(reviews).predict([("the cat", "a dog")])
    write_rows(tmp_path / "a.csv", [("the cat", "a dog")], ("text", "other"))
    message = "^text: expected the column of one text, as in training, found text, other$"
    with pytest.raises(UserError, match=message):
        predict(reviews, tmp_path / "a.csv", "--text", '["text", "other"]')
    message = "^text: expected the columns of a pair of texts, as in training, found text$"
    with pytest.raises(UserError, match=message):
        predict(numbers, tmp_path / "a.csv", "--text", "text")


# -- tags --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """The work directory of a tagger that knows animals, some of them red."""
    folder = tmp_path_factory.mktemp("tags")
    animals = [f"the O\n{noun} B-ANIMAL\nsat O\n\nthe O\nred B-ANIMAL\n{noun} I-ANIMAL\nran O\n" for noun in NOUNS[3:5]]
    others = [f"the O\n{noun} O\nwas O\ngood O\n" for noun in (*NOUNS[:3], "house")]
    for name in ("train.txt", "dev.txt"):
        write(folder / name, "\n".join([*animals, *others]))
    train(finetuning(folder / "run", task="tag", data={"path": str(folder), "format": "conll"}, steps=60, **FAST))
    return folder / "run"


def test_a_tagger_gives_every_word_its_tag_and_the_spans_they_mark(tagger, tmp_path):
    assert results_of(tagger)["score"] == 1.0
    write(tmp_path / "a.txt", "the red cat ran\n\nthe film was good\n")
    found = predict(tagger, tmp_path / "a.txt")
    assert found[0]["word"] == ["the", "red", "cat", "ran"]
    assert found[0]["tag"] == ["O", "B-ANIMAL", "I-ANIMAL", "O"]
    assert all(0.5 < share <= 1 for share in found[0]["probability"])
    assert found[0]["entities"] == [{"type": "ANIMAL", "start": 1, "end": 3}]
    assert "a.txt, line 2" in found[1]["error"]
    assert (found[2]["tag"], found[2]["entities"]) == (["O"] * 4, [])


def test_a_tagger_reads_the_words_of_a_column(tagger, tmp_path):
    write_rows(tmp_path / "a.csv", [("the dog sat", 1)], ("text", "n"))
    assert [line["tag"] for line in predict(tagger, tmp_path / "a.csv")] == [["O", "B-ANIMAL", "O"]]


def test_a_tagger_reads_files_with_a_word_a_line(tagger, tmp_path):
    write(tmp_path / "a.conll", "the O\nred cat\n\nthe O\n\n")
    write(tmp_path / "a.conllu", "# sent_id = 1\n1\tthe" + "\t_" * 8 + "\n2\tdog" + "\t_" * 8 + "\n\n")
    assert [line["word"] for line in predict(tagger, tmp_path / "a.conll")] == [["the", "red"], ["the"]]
    assert [line["tag"] for line in predict(tagger, tmp_path / "a.conllu")] == [["O", "B-ANIMAL"]]


def test_words_that_are_given_stay_the_words(tagger, tmp_path):
    rows = [{"text": ["the", "red cat", "is\u00a0big"]}, {"text": "the red cat"}, {"text": ["the", None]}, {"text": []}]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found = predict(tagger, tmp_path / "a.jsonl")
    assert [line.get("word") for line in found[:2]] == [["the", "red cat", "is\u00a0big"], ["the", "red", "cat"]]
    assert "a.jsonl, line 3: expected text in column 'text', found none" in found[2]["error"]
    assert "a.jsonl, line 4: expected words in column 'text', found none" in found[3]["error"]


# -- answers -----------------------------------------------------------------------------------------------------------

ASKED = [*QUESTIONS[:12], *((f"n{id}", "why", context, "") for id, _, context, _ in QUESTIONS[:4])]
TOLD = QUESTIONS[12:18] + [("long", "who ran", "the cat sat " * 20 + "and the dog ran", "the dog")]
TOLD += [(f"n{i}", "why", context, "") for i, (_, _, context, _) in enumerate(TOLD)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The work directory of a question answerer that may say nothing."""
    folder = tmp_path_factory.mktemp("answers")
    write(folder / "train.json", squad(ASKED))
    write(folder / "dev.json", squad(TOLD))
    data = {"path": str(folder), "format": "squad", "doc_stride": 4}
    train(finetuning(folder / "run", task="answer", head={"no_answer": True}, data=data, steps=20, **FAST))
    return folder / "run"


def golds(told):
    return {id: [answer] if answer else [] for id, _, _, answer in told}


def test_predicted_answers_score_as_the_evaluation_says(reader):
    """The null threshold, of which results.json has the best, is the model's in both."""
    found = predict(reader, reader.parent / "dev.json")
    assert [line["id"] for line in found] == [id for id, *_ in TOLD]
    figures = question_figures({line["id"]: line["text"] for line in found}, golds(TOLD))
    results = results_of(reader)["metrics"]
    assert {name: results[name] for name in figures} == figures
    assert results["NoAns_total"] == 7.0
    assert figures["f1"] == results["best_f1"]
    scores = sorted(line["null_score"] for line in found)
    threshold = json.loads((reader / "head.json").read_text())["null_threshold"]
    # between two scores, so that rounding decides nothing
    below, above = (scores[np.searchsorted(scores, threshold) + step] for step in (-1, 0))
    assert threshold == pytest.approx((below + above) / 2, rel=1e-5)
    assert below == pytest.approx(results["best_f1_thresh"], rel=1e-5)


def test_evaluate_gives_the_figures_of_the_results(reader):
    before = (reader / "head.json").read_text()
    status, output = call("evaluate", reader)
    assert status == 0
    for name, value in results_of(reader)["metrics"].items():
        assert f" {name} " in output and f" {value:.4f} " in output
    assert (reader / "head.json").read_text() == before


def test_an_answer_is_a_part_of_its_context_or_empty(reader):
    for line, (_, _, context, _) in zip(predict(reader, reader.parent / "dev.json"), TOLD, strict=True):
        assert line.keys() == {"id", "text", "start", "end", "probability", "null_score"}
        assert line["text"] == context[line["start"] : line["end"]]


def test_a_question_has_as_many_candidates_as_are_asked_for_best_first(reader, reviews):
    dev = reader.parent / "dev.json"
    found, plain = predict(reader, dev, "--n_best", "3"), predict(reader, dev)
    for line, same, (_, _, context, _) in zip(found, plain, TOLD, strict=True):
        candidates = line.pop("candidates")
        assert line == same
        assert len({candidate["text"] for candidate in candidates}) == 3
        assert all(each.keys() == {"text", "start", "end", "score", "probability"} for each in candidates)
        assert all(each["text"] == context[each["start"] : each["end"]] for each in candidates)
        assert line["text"] in ("", candidates[0]["text"])
        assert candidates == sorted(candidates, key=lambda each: -each["probability"])
    with pytest.raises(UserError, match="n_best 21: expected at most the 20 answers that the model keeps"):
        predict(reader, dev, "--n_best", "21")
    with pytest.raises(UserError, match="n_best is for a model that writes texts or answers questions"):
        predict(reviews, dev.with_name("a.txt"), "--n_best", "2")


def test_questions_come_from_a_table_or_lines_too(reader, tmp_path, monkeypatch):
    rows = [(context, question) for _, question, context, _ in TOLD]
    write_rows(tmp_path / "a.csv", [*rows[:2], ("the cat", ""), *rows[2:]], ("context", "question"))
    found = predict(reader, tmp_path / "a.csv")
    assert found[2].keys() == {"error"} and "a.csv, line 4" in found[2].pop("error")
    expected = predict(reader, reader.parent / "dev.json")

    def answers(lines):
        return [(line["text"], line["start"]) for line in lines if line]

    assert answers(found) == answers(expected)
    lines = "".join(f"{question}\t{context}\n" for context, question in rows)
    assert answers(from_stdin(monkeypatch, lines, reader, "-")) == answers(expected)
    with pytest.raises(UserError, match="expected the columns of question and context, found question"):
        predict(reader, tmp_path / "a.csv", "--text", "question")


def test_a_context_without_a_word_gives_an_error_and_the_rest_go_on(reader, tmp_path, monkeypatch):
    found = from_stdin(monkeypatch, "who\t\u200b\nwho ran\tthe dog ran\n", reader, "-")
    assert found[0] == {"error": "standard input, line 1: expected a context with a word, found '\\u200b'"}
    assert found[1].keys() > {"text", "start"}
    paragraphs = [{"context": "\u200b", "qas": [{"id": "a", "question": "who"}]}]
    write(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    assert [line.keys() for line in predict(reader, tmp_path / "a.json")] == [{"id", "error"}]


def test_a_question_that_cannot_be_read_gives_an_error_in_its_place(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("electrax.inference.predict.ROWS", 3)
    context = "the cat sat and the dog ran"

    def asked(*ids, context=context, text="who ran"):
        return {"context": context, "qas": [{"id": id, "question": text} for id in ids]}

    paragraphs = [
        asked("a"),
        asked("no question", text=" "),
        asked("b", 7, "c", None),
        asked("no context", "", context=""),
        asked("a"),
        asked("half \ud83d"),
        {"context": context, "qas": [{"id": "d", "question": "who ran", "answers": "not asked for"}]},
    ]
    write(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    status, output = call("predict", reader, tmp_path / "a.json")
    found = [json.loads(line) for line in output.splitlines()]
    assert status == 0 and output.encode()
    place = "a.json, article 1, paragraph {}, question {}: expected text in {}"
    expected = [
        ("a", None),
        ("no question", "a.json, question no question: expected text in 'question', found none"),
        ("b", None),
        (7, "a.json, question 7: expected text in 'id', found 7"),
        ("c", None),
        ("none", place.format(3, 4, "'id', found none")),
        ("no context", "a.json, question no context: expected text in 'context', found none"),
        ("none", place.format(4, 2, "'context', found none")),
        ("a", "a.json, question a: expected an id of its own, found one that was used before"),
        ("none", place.format(6, 1, "'id', found half a surrogate pair")),
        ("d", None),
    ]
    assert [line.get("id", "none") for line in found] == [id for id, _ in expected]
    for line, (_, message) in zip(found, expected, strict=True):
        assert line.get("error") == (message and f"{tmp_path}/{message}")
        assert message or line["text"] == context[line["start"] : line["end"]]


def test_a_file_of_questions_that_is_wrong_as_a_whole_is_an_error_before_the_first_line(reader, tmp_path):
    def first(text):
        config = PredictConfig(str(reader), str(write(tmp_path / "a.json", text)))
        return next(predict_lines(electrax.load(reader), config, ("question", "context")))

    good = json.loads(squad(TOLD[:1]))["data"]
    assert json.loads(first(json.dumps({"data": good})))["id"] == TOLD[0][0]
    with pytest.raises(UserError, match=r"^\S*a.json: expected JSON \(.*\)$"):
        first("the film was good\n")
    with pytest.raises(UserError, match=r"^\S*a.json: expected SQuAD's format, an object with a list of .* 'data'$"):
        first("[]")
    with pytest.raises(UserError, match=r"^\S*a.json, article 2: expected SQuAD's format, .* 'paragraphs'$"):
        first(json.dumps({"data": [*good, {"title": "b"}]}))


def test_a_model_as_an_object_says_the_same(reader, numbers, reviews):
    _, question, context, _ = TOLD[0]
    line = predict(reader, reader.parent / "dev.json")[0]
    found = electrax.load(reader).answer(question, context)
    assert found[:3] == (line["text"], line["start"], line["end"])
    assert found[3:5] == pytest.approx((line["probability"], line["null_score"]), rel=1e-3)
    assert electrax.load(reviews).predict(["the film was good"])[0]["label"] == "yes"
    assert electrax.load(numbers).predict([("the cat", "a dog")])[0].keys() == {"value"}


def test_a_model_computes_in_the_type_that_is_asked_for(reviews, tmp_path):
    texts = ["the film was good", "a bad film"]
    trained = electrax.load(reviews).predict(texts)
    model = electrax.load(reviews, compute_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16", "float32"}  # layers, the rest
    half = model.predict(texts)
    assert [row["label"] for row in half] == [row["label"] for row in trained]
    difference = max(abs(a["probability"] - b["probability"]) for a, b in zip(half, trained, strict=True))
    assert 0 < difference < 0.02
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    lines = predict(reviews, tmp_path / "texts.txt", "--compute_dtype", "bfloat16")
    assert [line["probability"] for line in lines] == pytest.approx([row["probability"] for row in half], abs=1e-3)
    with pytest.raises(UserError, match="compute_dtype: expected float32 or bfloat16, not 'half'"):
        electrax.load(reviews, compute_dtype="half")
