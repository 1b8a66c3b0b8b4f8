"""From labelled examples to the rows of a task."""

import json

import jax
import numpy as np
import pytest

from electrax.config import UserError, build
from electrax.data.tokenizer import SPECIALS, Tokenizer
from electrax.experiment.config import FinetuneConfig, HeadConfig
from electrax.experiment.examples import ExamplesConfig, read_examples
from electrax.experiment.finetune import make_rows
from electrax.experiment.objective import kind_of_rows
from electrax.experiment.rows import classify_rows
from electrax.inference.classifier import Classifier
from electrax.models.encoder import EncoderConfig
from electrax.tasks.classify import ClassifyTask
from tests.fixtures.finetuning import QUESTIONS, squad, write, write_rows
from tests.fixtures.weights import random_params

WORDS = "the film was good bad fine poor who ran cat dog sat and".split()
PAD, UNK, CLS, SEP = range(4)
NUMBER = {word: i for i, word in enumerate(SPECIALS + WORDS)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Of its own: rows kept by an earlier test would hide how they are made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(SPECIALS + WORDS), encoding="utf-8")
    return Tokenizer.load(path)


def rows_of(tokenizer, path, known=None, task="classify", **sections):
    values = {"task": task, "workdir": "unused", "batch_size": 4, **sections}
    values["data"] = {"path": str(path), "max_length": 12, "max_query": 4, "shapes": 1, **sections.get("data", {})}
    config = build(FinetuneConfig, values, "the test")
    return make_rows(config, tokenizer, read_examples(config.data, kind_of_rows(config), train=known is None), known)


def ids_of(rows, number):
    """The words of a row."""
    start, end = rows.rows.starts[number : number + 2]
    return rows.rows.tokens["ids"][start:end].tolist()


# -- classification ----------------------------------------------------------------------------------------------------

LABELLED = [("the film was good", "yes"), ("the film was bad", "no"), ("fine", "yes"), ("poor", "no")]


@pytest.fixture
def folder(tmp_path):
    """Four training and two dev rows."""
    write_rows(tmp_path / "train.csv", LABELLED)
    write_rows(tmp_path / "dev.csv", LABELLED[1:3])
    return tmp_path


def test_rows_of_classes_are_numbered_in_alphabetical_order(tokenizer, folder):
    rows = rows_of(tokenizer, folder)
    assert rows.head["classes"] == ["no", "yes"]
    assert rows.train.rows.fields["label"].tolist() == [1, 0, 1, 0]
    assert rows.dev.rows.fields["label"].tolist() == [0, 1]
    assert ids_of(rows.train, 0) == [CLS, *(NUMBER[word] for word in "the film was good".split()), SEP]
    assert rows.notes == ()


def test_a_known_head_gives_the_numbers_of_its_classes_whatever_labels_there_are(tokenizer, folder):
    known = rows_of(tokenizer, folder).head | {"classes": ["yes", "no"]}
    write_rows(folder / "dev.csv", LABELLED[1:2] * 3)
    rows = rows_of(tokenizer, folder, known)
    assert rows.head == known
    assert (rows.train, rows.dev.rows.fields["label"].tolist()) == (None, [1, 1, 1])


def test_a_row_that_is_too_long_is_cut_and_counted(tokenizer, folder):
    write_rows(folder / "train.csv", [(f"{text} {text}", label) for text, label in LABELLED])
    write_rows(folder / "dev.csv", [("the film was good " * 2, "yes"), ("cat " * 6, "no")])
    rows = rows_of(tokenizer, folder, data={"max_length": 8})
    assert rows.notes == ("2 train rows longer than 8 tokens were cut", "1 dev rows longer than 8 tokens were cut")
    assert ids_of(rows.train, 0) == [CLS, *(NUMBER[word] for word in "the film was good the film".split()), SEP]


def test_both_orders_double_the_training_rows_and_not_those_of_dev(tokenizer, tmp_path):
    pairs = [("good film", "bad", "x"), ("poor", "fine cat", "y")]
    for name in ("train.tsv", "dev.tsv"):
        write_rows(tmp_path / name, pairs, ("s", "t", "label"))
    rows = rows_of(tokenizer, tmp_path, data={"text": ["s", "t"], "both_orders": True})
    good, bad, film = (NUMBER[word] for word in ("good", "bad", "film"))
    assert (len(rows.train.rows), len(rows.dev.rows)) == (4, 2)
    assert ids_of(rows.train, 0) == [CLS, good, film, SEP, bad, SEP]
    assert ids_of(rows.train, 2) == [CLS, bad, SEP, good, film, SEP]
    assert rows.train.rows.fields["label"].tolist() == [0, 1, 0, 1]


def test_labels_are_divided_at_the_separator(tokenizer, tmp_path):
    table = [("the film", "fun;sad"), ("a cat", ""), ("a dog", "sad; new")]
    for name in ("train.csv", "dev.csv"):
        write_rows(tmp_path / name, table)
    rows = rows_of(tokenizer, tmp_path, head={"kind": "labels"}, data={"label_separator": ";"})
    assert rows.head["classes"] == ["fun", "new", "sad"]
    assert rows.train.rows.fields["label"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]


def test_several_labels_for_a_head_of_one_class_are_an_error_that_says_so(tokenizer, tmp_path):
    rows = [{"text": "the film", "label": ["fun", "sad"]}, {"text": "a cat", "label": "fun"}]
    for name in ("train.jsonl", "dev.jsonl"):
        write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"train.jsonl, line 1: expected one label, found \('fun', 'sad'\) \(head.kind"):
        rows_of(tokenizer, tmp_path)


def test_numbers_are_divided_by_the_greatest_of_the_training_rows(tokenizer, tmp_path):
    write_rows(tmp_path / "train.csv", [("film", "-50"), ("cat", "12.5"), ("dog", "0")])
    write_rows(tmp_path / "dev.csv", [("film", "100")])
    rows = rows_of(tokenizer, tmp_path, head={"kind": "number"})
    assert (rows.head["scale"], rows.head["classes"]) == (50.0, [])
    assert rows.train.rows.fields["label"].tolist() == [-1.0, 0.25, 0.0]
    assert rows.dev.rows.fields["label"].tolist() == [2.0]
    # of a model that is evaluated the scale is its own
    assert rows_of(tokenizer, tmp_path, rows.head, head={"kind": "number"}).dev.rows.fields["label"].tolist() == [2.0]
    write_rows(tmp_path / "train.csv", [("film", "0"), ("cat", "0")])
    assert rows_of(tokenizer, tmp_path, head={"kind": "number"}).head["scale"] == 1.0


def test_a_choice_has_a_row_of_the_context_with_each_of_its_texts(tokenizer, tmp_path):
    table = [("who ran", "the cat", "the dog", "0"), ("who sat", "cat", "dog", "1")]
    for name in ("train.tsv", "dev.tsv"):
        write_rows(tmp_path / name, table, ("q", "a", "b", "label"))
    rows = rows_of(tokenizer, tmp_path, head={"kind": "choice"}, data={"text": ["q", "a", "b"]})
    who, ran, the, cat, dog = (NUMBER[word] for word in ("who", "ran", "the", "cat", "dog"))
    assert len(rows.train.rows) == 2
    batch = rows.train.rows.batch(np.array([0, -1]), 8, {"ids": PAD})
    assert batch["ids"][0].tolist() == [
        [CLS, who, ran, SEP, the, cat, SEP, PAD],
        [CLS, who, ran, SEP, the, dog, SEP, PAD],
    ]
    assert (batch["label"].tolist(), batch["weight"].tolist()) == ([0, 0], [1, 0])
    assert (rows.head["classes"], rows.head["metric"]) == (["0", "1"], "accuracy")
    with pytest.raises(UserError, match=r"train.tsv, line 2: .* '0', '1' .*counted from 0\), found '2'"):
        write_rows(tmp_path / "train.tsv", [("who ran", "a", "b", "2")], ("q", "a", "b", "label"))
        rows_of(tokenizer, tmp_path, head={"kind": "choice"}, data={"text": ["q", "a", "b"]})


@pytest.mark.parametrize(
    "labels, message",
    [
        ("12", r"the number of the right choice, counted from 0, found 1, 2 alone \(counted from 1\?\)$"),
        ("AB", r"line 2: .*'1' \(the number of the right choice, counted from 0\), found 'A'"),
    ],
)
def test_labels_of_choices_that_do_not_count_from_0_are_an_error_that_says_so(tokenizer, tmp_path, labels, message):
    table = [("who ran", "the cat", "the dog", labels[0]), ("who sat", "cat", "dog", labels[1])]
    for name in ("train.tsv", "dev.tsv"):
        write_rows(tmp_path / name, table, ("q", "a", "b", "label"))
    with pytest.raises(UserError, match=message):
        rows_of(tokenizer, tmp_path, head={"kind": "choice"}, data={"text": ["q", "a", "b"]})


def classifier(tokenizer, **changes):
    """A teacher with random weights."""
    encoder = EncoderConfig(
        vocab_size=tokenizer.vocab_size, layers=1, width=16, heads=2, feed_forward=16, embedding_width=8, max_length=16
    )
    task = ClassifyTask(encoder, tokenizer.pad_id, tokenizer.sep_id, **changes)
    ids = np.zeros((1, 2, 16) if task.kind == "choice" else (1, 16), np.int32)
    params = random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": ids})))
    return Classifier(params, tokenizer, task, 12)


def taught(config, kind, tokenizer, teacher):
    train, dev, bad = read_examples(config)
    rows = classify_rows(config, HeadConfig(kind=kind), tokenizer, train, dev, bad, 8, None, teacher)
    assert "teacher" not in rows.dev.rows.fields
    return rows.train.rows.fields["teacher"]


def test_a_teacher_of_choices_gives_each_of_them_its_logit(tokenizer, tmp_path):
    table = [("who ran", "the cat", "the dog", "0"), ("who sat", "cat", "dog", "1")]
    for name in ("train.tsv", "dev.tsv"):
        write_rows(tmp_path / name, table, ("q", "a", "b", "label"))
    config = ExamplesConfig(path=str(tmp_path), text=("q", "a", "b"), max_length=12)
    teacher = classifier(tokenizer, kind="choice", classes=("0", "1"))
    found = taught(config, "choice", tokenizer, teacher)
    expected = teacher.logits([(q, choice) for q, *choices, _ in table for choice in choices])[:, 0]
    np.testing.assert_allclose(found, expected.reshape(2, 2), rtol=1e-6)
    assert len(np.unique(found)) == 4


def test_a_teacher_of_numbers_gives_them_in_the_units_of_the_rows(tokenizer, tmp_path):
    for name in ("train.csv", "dev.csv"):
        write_rows(tmp_path / name, [("film", "-50"), ("cat", "12.5")])
    teacher = classifier(tokenizer, kind="number", scale=100.0)
    found = taught(ExamplesConfig(path=str(tmp_path), max_length=12), "number", tokenizer, teacher)
    values = [row["value"] for row in teacher.predict(["film", "cat"])]
    np.testing.assert_allclose(found[:, 0] * 50.0, values, rtol=1e-5)


# -- bad rows ----------------------------------------------------------------------------------------------------------


def test_a_label_of_dev_that_was_never_trained_on_names_its_row(tokenizer, folder):
    write_rows(folder / "dev.csv", [*LABELLED[:2], ("fine", "maybe")])
    with pytest.raises(UserError, match=r"dev.csv, line 4: expected one of the labels 'no', 'yes', found 'maybe'"):
        rows_of(tokenizer, folder)


def test_all_bad_rows_of_both_files_are_counted_in_one_message(tokenizer, folder):
    write(folder / "train.csv", "text,label\nfine,yes\nbad,no\n,yes\nragged\npoor,no,3\n")
    write_rows(folder / "dev.csv", [("fine", "maybe"), ("good", "yes"), ("bad", "")])
    with pytest.raises(UserError) as caught:
        rows_of(tokenizer, folder)
    message = str(caught.value)
    assert "5 bad rows (" in message and "\n" not in message
    for part in (
        "2 ragged row",
        "2 label",
        "1 empty text",
        "train.csv, line 4",
        "train.csv, line 5",
        "dev.csv, line 2",
    ):
        assert part in message
    assert 'data.on_bad_row = "skip" leaves them out' in message


def test_bad_rows_may_be_left_out_and_are_then_counted_in_a_note(tokenizer, folder):
    write(folder / "train.csv", "text,label\nfine,yes\nbad,no\n,yes\nragged\npoor,no\n")
    write_rows(folder / "dev.csv", [("fine", "maybe"), ("good", "yes")])
    rows = rows_of(tokenizer, folder, data={"on_bad_row": "skip"})
    assert (len(rows.train.rows), len(rows.dev.rows)) == (3, 1)
    assert rows.notes == ("bad rows left out: 1 empty text, 1 ragged row, 1 label",)


@pytest.mark.parametrize(("file", "what"), [("train.csv", "train on"), ("dev.csv", "evaluate on")])
def test_no_row_left_is_an_error(tokenizer, folder, file, what):
    write_rows(folder / "train.csv", [("film", "1"), ("cat", "2")])
    write_rows(folder / "dev.csv", [("film", "1")])
    write_rows(folder / file, [("fine", "maybe")])
    with pytest.raises(UserError, match=f"no row is left to {what}"):
        rows_of(tokenizer, folder, head={"kind": "number"}, data={"on_bad_row": "skip"})


LABELS = {"head": {"kind": "labels"}, "data": {"label_separator": "|"}}


def test_one_label_is_enough_for_several_where_some_rows_lack_it(tokenizer, tmp_path):
    for name in ("train.csv", "dev.csv"):
        write_rows(tmp_path / name, [("the film", "toxic"), ("a cat", ""), ("a dog", "")])
    rows = rows_of(tokenizer, tmp_path, **LABELS)
    assert rows.head["classes"] == ["toxic"]
    assert rows.train.rows.fields["label"].tolist() == [[1], [0], [0]]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("", "no row has a label in 'label'; expected some that have one"),
        ("toxic", "all rows have the label 'toxic'; expected some rows without it, or other labels"),
    ],
)
def test_sets_of_labels_that_are_all_the_same_are_an_error(tokenizer, tmp_path, label, message):
    for name in ("train.csv", "dev.csv"):
        write_rows(tmp_path / name, [("the film", label), ("a cat", label)])
    with pytest.raises(UserError, match=message):
        rows_of(tokenizer, tmp_path, **LABELS)


def test_one_label_everywhere_is_an_error(tokenizer, folder):
    write_rows(folder / "train.csv", LABELLED[::2])
    write_rows(folder / "dev.csv", LABELLED[:1])
    with pytest.raises(UserError, match="all rows have the label 'yes'; expected two labels or more"):
        rows_of(tokenizer, folder)


# -- tags --------------------------------------------------------------------------------------------------------------

CONLL = "the O\ncat B-ANIMAL\nsat O\n\ndog B-ANIMAL\nran O\n"


def test_tags_of_spans_become_those_of_bioes_and_are_counted_at_words(tokenizer, tmp_path):
    write(tmp_path / "train.txt", CONLL)
    write(tmp_path / "dev.txt", "the O\ndog B-ANIMAL\ncat I-ANIMAL\n")
    rows = rows_of(tokenizer, tmp_path, task="tag", data={"format": "conll"})
    assert rows.head["classes"] == ["B-ANIMAL", "E-ANIMAL", "I-ANIMAL", "O", "S-ANIMAL"]
    assert (rows.head["scheme"], rows.head["metric"]) == ("IOB2", "f1")
    assert rows.train.rows.tokens["label"].tolist() == [-1, 3, 4, 3, -1, -1, 4, 3, -1]
    assert rows.dev.rows.tokens["label"].tolist() == [-1, 3, 0, 1, -1]


def test_plain_tags_are_taken_as_they_are(tokenizer, tmp_path):
    for name in ("train.txt", "dev.txt"):
        write(tmp_path / name, "the DET\ncat NOUN\n")
    rows = rows_of(tokenizer, tmp_path, task="tag", data={"format": "conll"})
    assert (rows.head["classes"], rows.head["scheme"], rows.head["metric"]) == (["DET", "NOUN"], None, "accuracy")


def test_a_sentence_with_an_unknown_tag_is_a_bad_row(tokenizer, tmp_path):
    write(tmp_path / "train.txt", CONLL)
    write(tmp_path / "dev.txt", "the O\ncat B-PLANT\n\ndog O\n")
    with pytest.raises(UserError, match=r"1 bad row \(1 tag\): .*dev.txt, line 1: word 2 has the tag 'B-PLANT'"):
        rows_of(tokenizer, tmp_path, task="tag", data={"format": "conll"})
    rows = rows_of(tokenizer, tmp_path, task="tag", data={"format": "conll", "on_bad_row": "skip"})
    assert (len(rows.dev.rows), rows.notes) == (1, ("bad rows left out: 1 tag",))


# -- answers -----------------------------------------------------------------------------------------------------------


def test_questions_become_windows_with_the_tokens_of_their_answers(tokenizer, tmp_path):
    asked = [("1", "who ran", "the cat sat and the dog ran", "the dog"), ("2", "who", "the cat sat", "")]
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", squad(asked))
    rows = rows_of(tokenizer, tmp_path, task="answer", data={"format": "squad"}, head={"no_answer": True})
    fields = rows.train.rows.fields
    # [CLS] who ran [SEP] the cat sat and the dog ran [SEP]
    assert (fields["start"].tolist(), fields["end"].tolist()) == ([8, 0], [9, 0])
    assert fields["impossible"].tolist() == [0, 1]
    assert [example.id for example in rows.windows.examples] == ["1", "2"]


def test_questions_are_tokenized_once_for_the_same_windows(tokenizer, tmp_path, monkeypatch):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", squad(QUESTIONS[:2]))

    def made(**data):
        rows = rows_of(tokenizer, tmp_path, task="answer", data={"format": "squad", **data})
        return rows.train.rows.sha256(), rows.dev.rows.sha256()

    first, calls = made(), []
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: calls.append(texts) or encode_batch(self, texts))
    assert made() == first and calls == []
    assert made(max_query=1) != first and calls != []


@pytest.mark.parametrize(("style", "threshold"), [("joint", -2.75), ("plain", 0.0)])
def test_the_null_threshold_is_that_of_the_head_unless_another_is_set(tokenizer, tmp_path, style, threshold):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", squad(QUESTIONS[:2]))

    def kept(known=None, **head):
        rows = rows_of(tokenizer, tmp_path, known, "answer", data={"format": "squad"}, head={"spans": style, **head})
        return rows.head["null_threshold"]

    assert kept() == threshold
    assert kept(null_threshold=1.5) == 1.5
    known = {"null_threshold": 0.25, "rows": ""}
    assert (kept(known), kept(known, null_threshold=1.5)) == (0.25, 1.5)


def test_a_question_that_may_be_answered_and_has_no_answer_cannot_be_trained_on(tokenizer, tmp_path):
    unanswered = {"context": "the cat sat", "qas": [{"id": "9", "question": "who"}]}
    train = json.loads(squad(QUESTIONS[:2]))
    train["data"][0]["paragraphs"].append(unanswered)
    write(tmp_path / "train.json", json.dumps(train))
    write(tmp_path / "dev.json", squad(QUESTIONS[:2]))
    with pytest.raises(UserError, match="train.json, question 9: expected an answer to learn from"):
        rows_of(tokenizer, tmp_path, task="answer", data={"format": "squad"})


def test_a_question_without_an_answer_needs_a_head_that_can_say_so(tokenizer, tmp_path):
    rows = [("who", "the cat sat", "the cat"), ("what", "the cat sat", "")]
    for split in ("train", "dev"):
        write_rows(tmp_path / f"{split}.csv", rows, ("question", "context", "answer"))
    data = {"text": ("question", "context"), "label": "answer"}
    with pytest.raises(UserError, match="train.csv, line 3: expected an answer, or head.no_answer true, found none"):
        rows_of(tokenizer, tmp_path, task="answer", data=data)
    left_out = rows_of(tokenizer, tmp_path, task="answer", data=data | {"on_bad_row": "skip"})
    assert len(left_out.train.rows) == 1
    both = rows_of(tokenizer, tmp_path, task="answer", data=data, head={"no_answer": True})
    # [CLS] who [SEP] the cat sat [SEP], and no place in the other
    assert (both.train.rows.fields["start"].tolist(), both.train.rows.fields["end"].tolist()) == ([3, 0], [4, 0])


def test_tags_come_from_the_columns_of_a_table_too(tokenizer, tmp_path):
    rows = [{"words": ["the", "cat"], "tags": ["O", "B-ANIMAL"]}, {"words": ["the", "dog"], "tags": ["O", "O"]}]
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = rows_of(tokenizer, tmp_path, task="tag", data={"text": ("words",), "label": "tags"})
    assert (found.head["scheme"], len(found.train.rows), len(found.dev.rows)) == ("IOB2", 2, 2)
    assert "S-ANIMAL" in found.head["classes"]


@pytest.mark.parametrize(
    ("task", "columns", "expected"),
    [("tag", ("a", "b"), "the one of the words"), ("answer", ("a",), "that of the question and that of the context")],
)
def test_the_number_of_text_columns_is_that_of_the_task(task, columns, expected):
    with pytest.raises(UserError, match=f"data.text names {len(columns)} columns; expected {expected}"):
        build(FinetuneConfig, {"task": task, "workdir": "w", "data": {"path": "a", "text": columns}}, "the test")
