import dataclasses
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from electrax.data.encoded import RowBatches, TokenRows, encode_pairs, kept
from electrax.data.examples import BadRows
from electrax.data.glue import GLUE, read_glue
from electrax.data.tokenizer import SPECIALS, Tokenizer
from electrax.storage import cache_folder

DATA = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = [f"w{i}" for i in range(40)]  # w0 is token 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(SPECIALS + WORDS), encoding="utf-8")
    return Tokenizer.load(path)


def words(first, count):
    return list(range(5 + first, 5 + first + count)), " ".join(WORDS[first : first + count])


# -- texts to ids -----------------------------------------------------------------------------------------------------


def test_a_text_or_a_pair_stands_between_special_tokens(tokenizer):
    rows, cut = encode_pairs(tokenizer, [("w0 w1",), ("w2", "w3 w4"), ("", "w5"), ("[SEP]",)], 8)
    assert rows[:3] == [[CLS, 5, 6, SEP], [CLS, 7, SEP, 8, 9, SEP], [CLS, SEP, 10, SEP]]
    assert SEP not in rows[3][1:-1]  # a text cannot spell a special token
    assert cut.tolist() == [False] * 4
    assert encode_pairs(tokenizer, [], 8)[0] == []


def test_a_long_text_loses_its_end_and_is_said_to_be_cut(tokenizer):
    rows, cut = encode_pairs(tokenizer, [(words(0, 4)[1],), (words(0, 3)[1],)], 5)
    assert rows == [[CLS, 5, 6, 7, SEP], [CLS, 5, 6, 7, SEP]]
    assert cut.tolist() == [True, False]


def popped(a, b, max_length):
    """The reference's rule, one token at a time."""
    a, b = list(a), list(b)
    while len(a) + len(b) > max_length - 3:
        (a if len(a) > len(b) else b).pop()
    return [CLS, *a, SEP, *b, SEP]


@hypothesis.given(st.integers(0, 20), st.integers(0, 20), st.integers(3, 45))
@hypothesis.settings(max_examples=300, deadline=None)
def test_of_a_long_pair_the_longer_text_loses_its_last_token_until_both_fit(tokenizer, first, second, max_length):
    (a, a_text), (b, b_text) = words(0, first), words(20, second)
    [row], [cut] = encode_pairs(tokenizer, [(a_text, b_text)], max_length)
    assert row == popped(a, b, max_length)
    assert cut == (first + second + 3 > max_length)


# -- rows to batches --------------------------------------------------------------------------------------------------


def ragged():
    rows = TokenRows.of([[1, 2, 3], [4], [5, 6]], {"word": [[0, 0, 1], [0], [-1, 2]]})
    return rows.with_fields(label=np.int32([7, 8, 9]))


def test_rows_know_their_number_and_lengths():
    rows = ragged()
    assert len(rows) == 3 and rows.lengths.tolist() == [3, 1, 2]
    assert rows.starts.tolist() == [0, 3, 4, 6] and rows.tokens["ids"].tolist() == [1, 2, 3, 4, 5, 6]
    assert len(TokenRows.of([])) == 0


def test_a_batch_is_padded_each_array_with_its_own_value():
    batch = ragged().batch(np.array([2, 0]), 4, {"ids": 0, "word": -1})
    assert batch["ids"].tolist() == [[5, 6, 0, 0], [1, 2, 3, 0]] and batch["ids"].dtype == np.int32
    assert batch["word"].tolist() == [[-1, 2, -1, -1], [0, 0, 1, -1]]
    assert batch["label"].tolist() == [9, 7] and batch["label"].dtype == np.int32
    assert batch["weight"].tolist() == [1, 1] and batch["weight"].dtype == np.float32


def test_the_row_minus_one_is_padding_of_weight_0_with_the_fields_of_row_0():
    batch = ragged().batch(np.array([1, -1]), 2, {"ids": 0, "word": -1})
    assert batch["ids"].tolist() == [[4, 0], [0, 0]] and batch["word"].tolist() == [[0, -1], [-1, -1]]
    assert batch["label"].tolist() == [8, 7] and batch["weight"].tolist() == [1, 0]


def test_fields_are_added_to_a_copy():
    rows = ragged()
    assert set(rows.with_fields(teacher=np.zeros((3, 2))).fields) == {"label", "teacher"}
    assert set(rows.fields) == {"label"}


def test_the_hash_is_of_everything_in_the_rows():
    rows = ragged()
    others = [
        rows.with_fields(label=np.int32([7, 8, 0])),
        rows.with_fields(teacher=np.int32([7, 8, 9])),
        TokenRows.of([[1, 2, 3], [4], [5, 9]], {"word": [[0, 0, 1], [0], [-1, 2]]}).with_fields(**rows.fields),
        TokenRows.of([[1, 2, 3], [4], [5, 6]], {"word": [[0, 0, 1], [9], [-1, 2]]}).with_fields(**rows.fields),
        TokenRows.of([[1, 2], [3, 4], [5, 6]], {"word": [[0, 0], [1, 0], [-1, 2]]}).with_fields(**rows.fields),
    ]
    assert ragged().sha256() == rows.sha256()
    assert len({rows.sha256(), *(other.sha256() for other in others)}) == 6


def choices():
    """Two questions of three choices each."""
    texts = TokenRows.of([[1], [2, 3], [4], [5, 6, 7], [8], [9, 10]])
    return dataclasses.replace(texts, fields={"label": np.int32([2, 0])}, group=3)


def test_the_choices_of_a_question_are_one_row_as_long_as_the_longest():
    rows = choices()
    assert len(rows) == 2 and rows.lengths.tolist() == [2, 3]
    batch = rows.batch(np.array([1, 0, -1]), 3, {"ids": 0})
    assert batch["ids"].tolist() == [
        [[5, 6, 7], [8, 0, 0], [9, 10, 0]],
        [[1, 0, 0], [2, 3, 0], [4, 0, 0]],
        [[0, 0, 0]] * 3,
    ]
    assert batch["label"].tolist() == [0, 2, 2] and batch["weight"].tolist() == [1, 1, 0]


def test_batches_of_a_split_are_the_buckets_rows_and_processes_take_their_part():
    batches = RowBatches.of(ragged(), 2, {"ids": 0, "word": -1}, shapes=2)
    whole = [batches.train_batch(step, 0, slice(None)) for step in range(2)]
    real = [row.tolist() for batch in whole for row in batch["label"][batch["weight"] > 0]]
    assert sorted(real) == [7, 8, 9] and sum(float(batch["weight"].sum()) for batch in whole) == 3
    for step in range(2):
        part = batches.train_batch(step, 0, slice(1, 2))
        assert {name: a[1:2].tolist() for name, a in whole[step].items()} == {k: a.tolist() for k, a in part.items()}


def test_an_evaluation_names_the_rows_of_each_batch():
    batches = RowBatches.of(ragged(), 2, {"ids": 0, "word": -1}, shapes=2)
    found = [(numbers.tolist(), batch["label"].tolist(), batch["ids"].shape)
             for batch, numbers in batches.eval_batches(slice(None))]  # fmt: skip
    assert found == [([1, 2], [8, 9], (2, 2)), ([0, -1], [7, 7], (2, 3))]  # the two shorter rows first
    assert [numbers.tolist() for _, numbers in batches.eval_batches(slice(1, 2))] == [[2], [-1]]


def test_the_longest_batch_has_the_largest_shape_and_no_row_that_only_fills_it():
    batches = RowBatches.of(ragged(), 2, {"ids": 0, "word": -1})
    assert batches.longest()["ids"].tolist() == [[1, 2, 3], [5, 6, 0]]
    more = RowBatches.of(ragged(), 5, {"ids": 0, "word": -1}).longest()
    assert more["ids"].shape == (5, 3) and more["weight"].tolist() == [1] * 5


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "rte", "wnli"])
def test_less_than_a_tenth_of_the_tokens_of_a_glue_training_set_is_padding(name):
    if not (DATA / "glue" / GLUE[name].title / "train.tsv").is_file():
        pytest.skip("GLUE's files are not here")
    examples = read_glue(DATA / "glue", GLUE[name], "train", BadRows("skip"))
    ids, _ = encode_pairs(Tokenizer.load(DATA / "vocab" / "vocab.txt"), [e.texts for e in examples], 128)
    buckets = RowBatches.of(TokenRows.of(ids), 32, {"ids": 0}, shapes=12).buckets
    assert len(buckets.buckets) <= 12
    assert buckets.padding_share() < 0.1


def test_few_rows_of_mixed_lengths_may_come_in_smaller_batches():
    """Twelve rows of 2 tokens and ten of 20: in batches of 16 and 6 all are padded to 20."""
    rows = TokenRows.of([[1] * 2] * 12 + [[1] * 20] * 10)

    def sizes(rows, **settings):
        batches = RowBatches.of(rows, 16, {"ids": 0}, **settings)
        return batches.buckets.batch_size, sorted(
            {batch["ids"].shape for batch, _ in batches.eval_batches(slice(None))}
        )

    assert sizes(rows) == sizes(rows, least=16) == sizes(rows, least=3) == (16, [(16, 20)])
    assert sizes(rows, least=4) == (4, [(4, 2), (4, 20)])
    assert sizes(rows, least=4, shapes=1) == (16, [(16, 20)])  # smaller ones would have no other length
    few = TokenRows.of([[1] * 2] * 8 + [[1] * 20] * 8)  # one batch: another shape would cost more than it saves
    assert sizes(few, least=1) == (16, [(16, 20)])


def test_less_than_a_tenth_of_the_tokens_of_a_small_glue_dev_set_is_padding():
    if not (DATA / "glue" / "WNLI" / "dev.tsv").is_file():
        pytest.skip("GLUE's files are not here")
    examples = read_glue(DATA / "glue", GLUE["wnli"], "dev", BadRows("skip"))
    ids, _ = encode_pairs(Tokenizer.load(DATA / "vocab" / "vocab.txt"), [e.texts for e in examples], 128)
    buckets = RowBatches.of(TokenRows.of(ids), 32, {"ids": 0}, shapes=12, least=1).buckets
    assert len(buckets.buckets) <= 12
    assert buckets.padding_share() < 0.1


# -- rows kept between runs -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "electrax"


class Built:
    """Counts how often rows are made."""

    def __init__(self, rows):
        self.rows, self.times = rows, 0

    def __call__(self):
        self.times += 1
        return self.rows


def assert_equal(rows, expected):
    np.testing.assert_array_equal(rows.starts, expected.starts)
    for found, wanted in ((rows.tokens, expected.tokens), (rows.fields, expected.fields)):
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
            assert found[name].dtype == wanted[name].dtype


def test_the_cache_lies_where_the_user_keeps_such_things(cache, monkeypatch):
    assert cache_folder() == cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == pathlib.Path("/home/someone/.cache/electrax")


def test_rows_of_the_same_content_are_made_once(cache):
    build = Built(ragged())
    for _ in range(3):
        assert_equal(kept(build, "hash", 128, [("a", "b"), ("\ud800", "東京")]), ragged())
    assert build.times == 1
    assert len(list((cache / "rows").iterdir())) == 1  # nothing half-written stays
    assert (cache / "rows").stat().st_mode & 0o077 == 0


def test_rows_of_other_content_are_made_anew():
    contents = [("hash", 128, [("a", "b")]), ("hash", 64, [("a", "b")]), ("other", 128, [("a", "b")]),
                ("hash", 128, [("b", "a")]), ("hash", 128, [("a",), ("b",)]), ("hash", 128, [("ab", "")])]  # fmt: skip
    made = [TokenRows.of([[number]]) for number in range(len(contents))]
    for _ in range(2):
        for content, rows in zip(contents, made, strict=True):
            assert_equal(kept(lambda rows=rows: rows, *content), rows)


def test_a_damaged_file_of_the_cache_is_made_anew_wherever_the_damage_is(cache):
    kept(lambda: ragged(), "content")
    [path] = (cache / "rows").iterdir()
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 9)]
    for content in [b"", b"rows", whole[:-1], whole + b"\0", *flipped]:
        path.write_bytes(content)
        build = Built(ragged())
        assert_equal(kept(build, "content"), ragged())
        assert build.times == 1 and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    build = Built(ragged())
    for _ in range(2):
        assert_equal(kept(build, "content"), ragged())
    assert build.times == 2


def test_a_full_disk_leaves_nothing_half_written(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("electrax.data.encoded.os.replace", full)
    assert_equal(kept(lambda: ragged(), "content"), ragged())
    assert list((cache / "rows").iterdir()) == []


def test_rows_are_not_taken_from_a_cache_that_others_can_write_into(cache, caplog):
    kept(lambda: ragged(), "content")
    (cache / "rows").chmod(0o777)
    build = Built(ragged())
    assert_equal(kept(build, "content"), ragged())
    assert build.times == 1 and "can be written by others" in caplog.text
