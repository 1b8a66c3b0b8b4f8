import gzip
import json
import pathlib

import pytest

from electrax.config import UserError
from electrax.data.examples import Answer, BadRows
from electrax.data.squad import BadQuestion, iter_squad, read_mrqa, read_squad

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "squad"
CONTEXT = "Zoë 🙂 lives in  Bonn."  # "lives" at 6, "Bonn" at 16, in characters


def question(id="q1", question="Where?", answers=(("Bonn", 16),), **more):
    return {"id": id, "question": question, "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}


def squad(*questions, context=CONTEXT):
    return {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": list(questions)}]}]}


@pytest.fixture
def read(tmp_path):
    """([examples], counts of bad rows) of a file written as JSON, or as JSON lines from a list."""

    def read(content, skip=False, name="a.json"):
        path, bad = tmp_path / name, BadRows("skip" if skip else "error")
        lines = content if isinstance(content, list) else [content]
        data = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        rows = (read_mrqa if "jsonl" in name else read_squad)(path, bad)
        bad.close(path)
        return rows, dict(bad.counts)

    return read


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_answers_start_at_a_character_of_the_context(read, name):
    (row,), _ = read(squad(question(answers=[("Bonn", 16), ("in  Bonn", 12)])), name=name)
    assert row.answers == (Answer("Bonn", 16), Answer("in  Bonn", 12))
    assert (row.id, row.question, row.context, row.impossible, row.golds) == ("q1", "Where?", CONTEXT, False, ())
    assert row.where.endswith(f"{name}, question q1")


def test_impossible_questions_have_no_answer(read):
    rows, _ = read(squad(question(answers=[], is_impossible=True), question("q2", is_impossible=False)))
    assert [(row.answers, row.impossible) for row in rows] == [((), True), ((Answer("Bonn", 16),), False)]


def test_a_test_set_has_no_answers(read):
    (row,), _ = read(squad({"id": "q1", "question": "Where?"}))
    assert row.answers == () and not row.impossible


@pytest.mark.parametrize(
    "bad, kind, message",
    [
        (question("q2", answers=[("Bonn", 15)]), "answer", "the answer 'Bonn' at character 15, found ' Bon'"),
        (question("q2", answers=[("in Bonn", 12)]), "answer", "the answer 'in Bonn' at character 12, found 'in  Bon'"),
        (question("q2", answers=[("Bonn", 16), ("Köln", 16)]), "answer", "the answer 'Köln' at character 16"),
        (question("q2", answers=[("Bonn.", -5)]), "answer", "the answer 'Bonn.' at character -5"),
        (question("q2", answers=[("Bonn", 999)]), "answer", "the answer 'Bonn' at character 999, found ''"),
        (question("q2", answers=[("", 16)]), "answer", "an answer with 'text' and 'answer_start', found {'text': ''"),
        (question("q2", answers=[("Bonn", "16")]), "answer", "an answer with 'text' and 'answer_start'"),
        (question("q2") | {"answers": ["Bonn"]}, "answer", "an answer with 'text' and 'answer_start', found 'Bonn'"),
        (question("q2", answers=[]), "answer", r"a list of answers, found \[\]"),
        (question("q2") | {"answers": {"text": "Bonn"}}, "answer", "a list of answers, found {'text': 'Bonn'}"),
        (question("q2", is_impossible=True), "answer", "no answers to an impossible question"),
        (question("q2", is_impossible="no"), "answer", "true or false in 'is_impossible', found 'no'"),
        (question("q2", question=" "), "empty text", "text in 'question', found none"),
        (question("q2", question=None), "empty text", "text in 'question', found none"),
        (question(""), "empty text", "text in 'id', found none"),
        (question(7), "not text", "text in 'id', found 7"),
        (question("q1"), "duplicate id", "an id of its own"),
    ],
)
def test_bad_questions_are_named_by_id_or_left_out(read, bad, kind, message):
    content = squad(question("q1"), bad, question("q3"))
    place = f"question {bad['id']}" if bad["id"] else "article 1, paragraph 1, question 2"
    with pytest.raises(UserError, match=rf"1 bad row \(1 {kind}\): .*a.json, {place}: expected {message}"):
        read(content)
    rows, counts = read(content, skip=True)
    assert [row.id for row in rows] == ["q1", "q3"] and counts == {kind: 1}


def test_every_question_on_a_paragraph_without_context_is_a_bad_row(read):
    content = squad(question())
    content["data"][0]["paragraphs"].insert(0, {"context": "", "qas": [question("q0"), question("")]})
    with pytest.raises(UserError) as caught:
        read(content)
    assert "2 bad rows (2 empty text)" in str(caught.value)
    assert "a.json, question q0: expected text in 'context', found none" in str(caught.value)
    assert "a.json, article 1, paragraph 1, question 2: expected text in 'context'" in str(caught.value)
    rows, counts = read(content, skip=True)
    assert ([row.id for row in rows], counts) == (["q1"], {"empty text": 2})


def test_bad_questions_stand_in_their_place_with_the_id_they_have(tmp_path):
    ids = ["a", "", None, 7, True, {"n": 1}, "\ud800", "a", "b"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(squad(*map(question, ids))))
    rows = list(iter_squad(path))
    assert [type(row) is BadQuestion for row in rows] == [False, *[True] * 7, False]
    assert [row.id for row in rows] == ["a", None, None, 7, None, None, None, "a", "b"]
    assert [row.kind for row in rows[1:8]] == [*["empty text"] * 2, *["not text"] * 3, "encoding", "duplicate id"]


def test_answers_that_are_not_asked_for_may_be_anything(tmp_path):
    wrong = [question("a", answers=[("Bonn", 3)]), question("b") | {"answers": 5}, question("c", is_impossible="no")]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(squad(*wrong)))
    rows = list(iter_squad(path, answers=False))
    assert [(row.id, row.question, row.context, row.answers) for row in rows] == [
        (id, "Where?", CONTEXT, ()) for id in "abc"
    ]
    assert all(type(row) is BadQuestion for row in iter_squad(path))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "a.json: expected JSON"),
        ([1, 2], "a.json: expected JSON"),
        ({"rows": []}, "a.json: expected SQuAD's format, an object with a list of objects in 'data'"),
        ({"data": [{"title": "T"}]}, "a.json, article 1: expected .* in 'paragraphs'"),
        ({"data": [{"paragraphs": ["text"]}]}, "a.json, article 1: expected .* in 'paragraphs'"),
        ({"data": [{"paragraphs": [{"context": "text"}]}]}, "a.json, article 1, paragraph 1: expected .* in 'qas'"),
        ({"data": []}, "a.json: expected rows, found none"),
    ],
)
def test_what_is_not_squads_format_is_refused_at_once(read, content, message):
    with pytest.raises(UserError, match=message):
        read(content, skip=True)


# -- MRQA -------------------------------------------------------------------------------------------------------------

MRQA_CONTEXT = "[TLE] Bonn [PAR] Bonn is on the  Rhine."  # "Bonn" at 6 and 17, "the  Rhine" at 28
HEADER = {"header": {"dataset": "Tiny", "mrqa_split": "train"}}


def detected(text, *spans):
    return {"text": text, "char_spans": [list(span) for span in spans], "token_spans": []}


BONN = detected("Bonn", (6, 9), (17, 20))


def mrqa(qid="q1", found=(BONN,), answers=("Bonn",), question="What?", **more):
    qa = {"qid": qid, "question": question, "answers": list(answers), "detected_answers": list(found), **more}
    return {"id": "", "context": MRQA_CONTEXT, "context_tokens": [], "qas": [qa]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_every_detected_span_is_an_answer_that_ends_with_its_last_character(read, name):
    rows, _ = read([HEADER, mrqa(answers=["Bonn", "the city of Bonn"]), "", mrqa("q2")], name=name)
    assert rows[0].answers == (Answer("Bonn", 6), Answer("Bonn", 17))
    assert rows[0].golds == ("Bonn", "the city of Bonn") and rows[1].golds == ("Bonn",)
    assert rows[0].context == MRQA_CONTEXT and [row.id for row in rows] == ["q1", "q2"]
    assert rows[0].where.endswith(f"{name}, line 2, question q1") and "line 4" in rows[1].where


def test_spans_may_differ_from_the_answer_in_case_and_punctuation(read):
    (row,), _ = read([HEADER, mrqa(found=[detected("the rhine", (28, 37))], answers=["the rhine"])], name="a.jsonl")
    assert row.answers == (Answer("the  Rhine", 28),) and row.golds == ("the rhine",)


def test_an_mrqa_test_set_has_no_answers(read):
    record = mrqa()
    del record["qas"][0]["detected_answers"], record["qas"][0]["answers"]
    (row,), _ = read([record], name="a.jsonl")
    assert row.answers == ()


@pytest.mark.parametrize(
    "bad, kind, message",
    [
        (
            mrqa("q2", [detected("Bonn", (6, 8))]),
            "answer",
            ", question q2: expected the answer 'Bonn' at character 6, found 'Bon'",
        ),
        (
            mrqa("q2", [detected("Bonn", (-4, -1))]),
            "answer",
            ", question q2: expected the answer 'Bonn' at character -4",
        ),
        (
            mrqa("q2", [detected("Bonn")]),
            "answer",
            ", question q2: expected a list of answers with 'text' and 'char_spans'",
        ),
        (mrqa("q2", [detected("Bonn", (6, 9, 1))]), "answer", ", question q2: expected a list of answers with"),
        (mrqa("q2", [detected("Bonn", ("6", 9))]), "answer", ", question q2: expected a list of answers with"),
        (
            mrqa("q2", []),
            "answer",
            r", question q2: expected a list of answers with 'text' and 'char_spans', found \[\]",
        ),
        (mrqa("q2", question=""), "empty text", ", question q2: expected text in 'question', found none"),
        (mrqa(""), "empty text", ": expected text in 'qid', found none"),
        (mrqa("q1"), "duplicate id", ", question q1: expected an id of its own"),
        ("{", "JSON", ": expected one JSON object a line"),
        ({"context": "text"}, "JSON", ": expected an object with 'context' and a list of objects in 'qas'"),
        (mrqa("q2") | {"context": ""}, "empty text", ": expected text in 'context', found none"),
    ],
)
def test_bad_mrqa_lines_are_named_or_left_out(read, bad, kind, message):
    content = [HEADER, mrqa("q1"), bad, mrqa("q3")]
    with pytest.raises(UserError, match=rf"1 bad row \(1 {kind}\): .*a.jsonl, line 3{message}"):
        read(content, name="a.jsonl")
    rows, counts = read(content, skip=True, name="a.jsonl")
    assert [row.id for row in rows] == ["q1", "q3"] and counts == {kind: 1}


def test_a_file_that_is_no_json_lines_is_refused_at_once(read):
    with pytest.raises(UserError, match="a.jsonl, line 1: expected one JSON object a line"):
        read(["text", mrqa()], skip=True, name="a.jsonl")


@pytest.mark.skipif(not REAL.exists(), reason="the benchmark's files are not here")
@pytest.mark.parametrize("version, questions, impossible", [("v1.1", 10570, 0), ("v2.0", 11873, 5945)])
def test_the_benchmarks_files_have_the_official_number_of_questions(version, questions, impossible):
    bad = BadRows("error")
    examples = read_squad(REAL / f"dev-{version}.json.gz", bad)
    assert len(examples) == questions and sum(e.impossible for e in examples) == impossible and not bad.counts
    assert all(bool(e.answers) != e.impossible for e in examples)
