import hashlib
import json
import lzma

import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.corpus import Corpus, sample_path
from electrax.data.prepare import PrepareConfig, prepare
from electrax.data.tokenizer import Tokenizer


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus of rows in several shards."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat number {n} sat on mat {n * n}" for n in range(60)))
    monkeypatch.setattr("electrax.data.prepare.MEGABYTE", 200)  # shards of 12 rows
    prepare(PrepareConfig((str(text),), str(tmp_path / "out"), vocab_size=60, max_length=8, workers=1, shard_mb=1))
    return tmp_path / "out"


def test_rows_gather_across_shards_in_the_order_asked_for(corpus):
    opened = Corpus.open(corpus)
    shards = opened.manifest.splits["train"].shards
    assert len(shards) > 3 and {s.rows for s in shards[:-1]} == {12}
    whole = np.concatenate([np.fromfile(corpus / s.file, np.uint16).reshape(-1, 8) for s in shards])
    assert len(whole) == opened.size("train")
    indices = np.array([len(whole) - 1, 0, 13, 13, 12, 11])
    rows = opened.rows("train", indices)
    assert rows.dtype == np.uint16 and rows.tolist() == whole[indices].tolist()


def test_a_negative_index_gives_a_row_of_padding(corpus):
    rows = Corpus.open(corpus).rows("valid", np.array([0, -1]))
    assert rows[0].any() and rows[1].tolist() == [0] * 8


def test_a_row_or_split_that_is_not_there_is_an_error(corpus):
    opened = Corpus.open(corpus)
    with pytest.raises(IndexError, match="'train'"):
        opened.rows("train", np.array([opened.size("train")]))
    with pytest.raises(UserError, match="expected the split train or valid, not 'test'"):
        opened.size("test")


def test_verify_finds_one_flipped_bit(corpus):
    path = corpus / "train-00001.bin"
    Corpus.open(corpus).verify()
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="train-00001.bin: damaged"):
        Corpus.open(corpus).verify()


def test_opening_names_a_missing_or_cut_shard(corpus):
    path = corpus / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="train-00001.bin: expected 192 bytes, found 191"):
        Corpus.open(corpus)
    path.unlink()
    with pytest.raises(UserError, match="train-00001.bin: missing"):
        Corpus.open(corpus)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: "{", "manifest.json: not JSON"),
        (lambda text: "[]", "expected format_version 2, found None"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), "expected format_version 2, found 1"),
        (lambda text: text.replace('"layout"', '"Layout"'), r"damaged \(it does not fit its own checksum\)"),
        (lambda text: text.replace('"mask": ', '"mask": 1'), r"damaged \(it does not fit its own checksum\)"),
    ],
)
def test_a_bad_manifest_is_named(corpus, change, message):
    path = corpus / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        Corpus.open(corpus)


def test_a_directory_without_a_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match="manifest.json: no such file"):
        Corpus.open(tmp_path)


def test_the_tokenizer_must_be_the_one_that_made_the_rows(corpus):
    assert (
        Corpus.open(corpus).tokenizer().sha256 == json.loads((corpus / "manifest.json").read_text())["tokenizer_sha256"]
    )
    Tokenizer.train("bpe", ["another text"], 270).save(corpus)
    with pytest.raises(UserError, match="the tokenizer is not the one"):
        Corpus.open(corpus).tokenizer()


def test_the_bundled_sample_holds_four_books():
    text = lzma.open(sample_path(), "rt", encoding="utf-8").read()
    assert text.count("\n\n") > 200 and all(name in text for name in ("Alice", "Dorothy", "Holmes", "Frankenstein"))


def changes(manifest):
    """Wrong manifests, by what is named."""
    split = manifest["splits"]["train"]
    yield "max_length", manifest | {"max_length": 0}
    yield "max_length", manifest | {"max_length": 8.0}
    yield "vocab_size", manifest | {"vocab_size": True}
    yield "dtype", manifest | {"dtype": "object"}
    yield "special_ids", manifest | {"special_ids": {**manifest["special_ids"], "pad": -1}}
    yield "special_ids", manifest | {"special_ids": {"pad": 0}}
    for rows in (-12, 10**30, "12", 0):
        shards = [split["shards"][0] | {"rows": rows}, *split["shards"][1:]]
        yield "splits.train", manifest | {"splits": {"train": split | {"shards": shards}}}
    yield "splits.train: the rows", manifest | {"splits": {"train": split | {"rows": split["rows"] + 1}}}
    for file in ("../corpus.bin", "/etc/passwd", "", 3):
        shards = [split["shards"][0] | {"file": file}, *split["shards"][1:]]
        yield "splits.train: the shard", manifest | {"splits": {"train": split | {"shards": shards}}}
    yield "'items'", manifest | {"splits": []}
    yield "not iterable", manifest | {"splits": {"train": split | {"shards": 5}}}


def test_a_manifest_whose_numbers_or_names_are_wrong_is_refused(corpus):
    path = corpus / "manifest.json"
    for message, wrong in changes(json.loads(path.read_text())):
        wrong.pop("sha256")
        sha256 = hashlib.sha256(json.dumps(wrong, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(wrong | {"sha256": sha256}))
        with pytest.raises(UserError, match=f"manifest.json: not a manifest of format 2 .*({message}|Type-check)"):
            Corpus.open(corpus)


def test_a_prepared_corpus_is_its_users_alone(corpus):
    assert corpus.stat().st_mode & 0o777 == 0o700
