"""From files to labelled examples."""

import gzip
import json

import pytest

from electrax.config import UserError, build
from electrax.data.examples import QuestionExample, TextExample
from electrax.experiment.examples import ExamplesConfig, hold_out, read_examples, texts_of
from tests.fixtures.finetuning import QUESTIONS, squad, write, write_rows

TEN = [(f"film {i}", "ab"[i % 2]) for i in range(10)]


def read(path, only_dev=False, **data):
    """(texts of the training rows, texts of the dev rows, how many rows were bad)."""
    config = build(ExamplesConfig, {"path": str(path), **data}, "the test")
    rows, dev, bad = read_examples(config, train=not only_dev)
    return [e.texts[0] for e in rows], [e.texts[0] for e in dev], bad.counts.total()


# -- which files -------------------------------------------------------------------------------------------------------


def test_a_dev_file_of_a_folder_is_found_by_its_name_compressed_or_not(tmp_path):
    write_rows(tmp_path / "train.csv", TEN)
    (tmp_path / "test.csv").write_text("text\nnot for this\n")
    for name in ("validation.jsonl.gz", "valid.csv", "dev.tsv"):
        text = "text\tlabel\n" if name.endswith("tsv") else "text,label\n"
        row = json.dumps({"text": name, "label": "a"}) if "jsonl" in name else name + text[4] + "a"
        data = ("" if "jsonl" in name else text) + row + "\n"
        (tmp_path / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
        assert read(tmp_path)[1] == [name]  # dev before valid before validation, and a test set never
    assert len(read(tmp_path)[0]) == 10


def test_rows_may_be_named_in_the_folder_beside_the_file_or_anywhere(tmp_path):
    path = write_rows(tmp_path / "a" / "mine.csv", TEN)
    write_rows(tmp_path / "a" / "other.csv", [("other", "a")])
    far = write_rows(tmp_path / "b" / "far.csv", [("far", "a")])
    assert read(path, dev="other.csv")[1] == read(tmp_path / "a", train="mine.csv", dev="other.csv")[1] == ["other"]
    assert read(path, dev=str(far))[1] == ["far"]


def test_the_rows_to_train_on_are_named_once(tmp_path):
    path = write_rows(tmp_path / "mine.csv", TEN)
    with pytest.raises(UserError, match="data.train other.csv: .*mine.csv is a file; expected a folder as data.path"):
        read(path, train="other.csv")
    assert len(read(path, train="other.csv", dev="mine.csv", only_dev=True)[1]) == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"path": "gone.csv"}, "gone.csv: no such file or folder"),
        ({"path": ""} | {"holdout": 1.0}, "data.holdout must lie between 0 and 1, not 1.0"),
        ({"format": "glue", "glue": "col"}, "data.glue must be one of cola, .* not 'col'"),
        ({"dev": "gone.csv"}, "gone.csv: no such file"),
        ({"train": "gone.csv"}, "gone.csv: no such file"),
        ({"format": "squad"}, "expected train.json or the like in it, or its name as data.train"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.csv", TEN)
    with pytest.raises(UserError, match=message):
        read(**({"path": tmp_path} | data))


# -- rows kept apart, and fewer rows -----------------------------------------------------------------------------------


def test_the_same_share_of_the_rows_is_kept_apart_in_every_run(tmp_path):
    path = write_rows(tmp_path / "a.csv", TEN)
    train, dev, _ = read(path, holdout=0.3)
    assert (len(train), len(dev)) == (6, 4)  # of 5 rows of each class 1.5, which is rounded
    assert sorted(train + dev) == [text for text, _ in TEN]
    assert read(path, holdout=0.3)[:2] == (train, dev)
    # in the order of the file, and the evaluation alone has the same rows
    assert train == sorted(train) and dev == sorted(dev)
    assert read(path, only_dev=True, holdout=0.3)[:2] == ([], dev)


def test_a_limit_draws_the_same_training_rows_every_time_and_no_row_from_dev(tmp_path):
    path = write_rows(tmp_path / "a.csv", TEN)
    train, dev, _ = read(path, holdout=0.2)
    some, same_dev, _ = read(path, holdout=0.2, limit=3)
    assert len(some) == 3 and set(some) < set(train) and some == sorted(some) and same_dev == dev
    assert read(path, holdout=0.2, limit=3)[0] == some != train[:3]
    write_rows(tmp_path / "dev.csv", TEN[:5])
    assert [len(part) for part in read(path, dev="dev.csv", limit=3)[:2]] == [3, 5]


def test_at_least_one_row_is_kept_apart_and_one_row_cannot_be_divided(tmp_path):
    assert [len(part) for part in read(write_rows(tmp_path / "a.csv", TEN[:3]))[:2]] == [2, 1]
    with pytest.raises(UserError, match="a.csv: no row can be kept apart to evaluate on, as each has a label that no"):
        read(write_rows(tmp_path / "a.csv", TEN[:2]))
    with pytest.raises(UserError, match="one row cannot be divided"):
        read(write_rows(tmp_path / "b.csv", TEN[:1]))


def test_a_row_whose_label_no_training_row_has_is_trained_on():
    rows = [TextExample(f"line {i}", ("text",), "rare" if i == 3 else "ab"[i % 2]) for i in range(10)]
    for share in (0.1, 0.3, 0.9):
        train, dev = hold_out(rows, share, "classes")
        assert {"rare"} <= {row.label for row in train} >= {row.label for row in dev}
        assert sorted(row.where for row in train + dev) == sorted(row.where for row in rows)


@pytest.mark.parametrize(("sizes", "kept"), [((30, 30), (3, 3)), ((90, 10, 2, 1), (9, 1, 1, 0)), ((4, 4), (1, 1))])
def test_of_each_class_its_share_is_kept_apart_and_never_its_last_row(sizes, kept):
    labels = [label for label, size in zip("abcd", sizes, strict=False) for _ in range(size)]
    rows = [TextExample(f"line {i}", ("text",), label) for i, label in enumerate(labels)]
    dev = [row.label for row in hold_out(rows, 0.1, "classes")[1]]
    assert tuple(dev.count(label) for label in "abcd"[: len(sizes)]) == kept


def test_sets_of_labels_are_kept_apart_only_where_training_rows_have_each_of_them_too():
    sets = [("x", "rare"), ("x",), ("y",), ("x", "y")] + [("x",), ("y",)] * 3
    rows = [TextExample(f"line {i}", ("text",), labels) for i, labels in enumerate(sets)]
    train, dev = hold_out(rows, 0.9, "labels")
    assert rows[0] in train and {"x", "y"} <= {label for row in train for label in row.label}
    assert len(dev) == 8


def test_questions_on_one_context_are_kept_apart_together():
    rows = [QuestionExample(f"{i}", f"{i}", "who", f"context {i % 4}", ()) for i in range(40)]
    train, dev = hold_out(rows, 0.25, "classes")
    assert len(dev) == 10
    assert {row.context for row in train}.isdisjoint(row.context for row in dev)


def test_numbers_need_not_have_been_seen():
    rows = [TextExample(f"line {i}", ("text",), str(i / 7)) for i in range(20)]
    assert [len(part) for part in hold_out(rows, 0.25, "number")] == [15, 5]


# -- texts -------------------------------------------------------------------------------------------------------------


def test_every_text_is_there_to_train_a_tokenizer_on(tmp_path):
    pairs = write_rows(tmp_path / "a.tsv", [("a b", "c", "x")] * 2, ("s", "t", "label"))
    squads = write(tmp_path / "squad" / "train.json", squad(QUESTIONS[:2]))
    conll = write(tmp_path / "train.txt", "cat NN\nsat VB\n\ndog NN\n")
    found = {}
    for name, (path, data) in {
        "pairs": (pairs, {"text": ["s", "t"]}),
        "squad": (squads.parent, {"format": "squad", "dev": "train.json"}),
        "conll": (conll, {"format": "conll", "dev": "train.txt"}),
    }.items():
        config = build(ExamplesConfig, {"path": str(path), **data}, "the test")
        found[name] = texts_of(read_examples(config)[0])
    assert found["pairs"] == ["a b", "c"]
    assert found["squad"] == [text for _, *texts, _ in QUESTIONS[:2] for text in texts]
    assert found["conll"] == ["cat sat", "dog"]
