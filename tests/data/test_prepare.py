import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from electrax import storage
from electrax.config import UserError
from electrax.data import encode, shards
from electrax.data import prepare as module
from electrax.data.corpus import Corpus
from electrax.data.prepare import PrepareConfig, prepare
from electrax.data.tokenizer import Tokenizer

SMALL = {"CHUNK_CHARACTERS": 2000, "SAVE_EVERY": 2, "MEGABYTE": 1000}
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "mat",
    "sat",
    "ran",
    "on",
    "under",
    "over",
    "big",
    "small",
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
]


def text_of(documents, seed=0):
    chance = random.Random(seed)
    sentence = lambda: " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))  # noqa: E731
    return ["\n".join(sentence() for _ in range(chance.randint(1, 6))) for _ in range(documents)]


@pytest.fixture
def texts(tmp_path):
    documents = text_of(300)
    (tmp_path / "a.txt").write_text("\n\n".join(documents[:200]))
    (tmp_path / "b.txt").write_text("\n\n".join(documents[200:]))
    return documents


@pytest.fixture
def config(texts, tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[:-1]]))  # "three" is unknown
    return lambda **more: PrepareConfig(
        **{
            "texts": (str(tmp_path / "a.txt"), str(tmp_path / "b.txt")),
            "out": str(tmp_path / "out"),
            "tokenizer": str(vocab),
            "max_length": 16,
            "workers": 1,
            **more,
        }
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def all_rows(corpus, split):
    return corpus.rows(split, np.arange(corpus.size(split)))


def test_packed_rows_hold_every_token_of_every_document_in_order(config, texts, tmp_path):
    manifest = prepare(config(holdout=0.01)).manifest
    corpus = Corpus.open(tmp_path / "out")
    corpus.verify()
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    held_out = {99, 199, 299}  # every hundredth document
    for split, numbers in (("valid", sorted(held_out)), ("train", [n for n in range(300) if n not in held_out])):
        rows = all_rows(corpus, split)
        expected = [i for ids in tokenizer.encode_batch([texts[n] for n in numbers]) for i in ids]
        assert [i for i in rows.ravel().tolist() if i not in (0, 2, 3)] == expected
        assert manifest.splits[split].documents == len(numbers)
        assert manifest.splits[split].tokens == (rows != 0).sum()
        assert (rows[:, 0] == 2).all()  # each begins with [CLS]


def test_counts_are_of_the_text_that_was_read(config, texts, tmp_path):
    counts = prepare(config()).manifest.counts
    words = " ".join(texts).split()
    assert counts["text_tokens"] == len(words)
    assert counts["unknown_share"] == words.count("three") / len(words)
    rows = np.concatenate([all_rows(Corpus.open(tmp_path / "out"), split) for split in ("train", "valid")])
    assert counts["padding_share"] == pytest.approx((rows == 0).mean()) and counts["skipped"] == {}
    assert counts["text_bytes"] == sum(len(line) + 1 for text in texts for line in text.split("\n"))


@pytest.mark.parametrize("layout", ["packed", "segments"])
def test_the_number_of_workers_changes_no_byte(config, tmp_path, layout):
    for workers in (0, 1, 2):
        prepare(config(out=str(tmp_path / f"out{workers}"), workers=workers, layout=layout))
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_a_short_text_starts_no_worker_that_nobody_asked_for(config, monkeypatch):
    monkeypatch.setattr(encode.multiprocessing, "get_context", lambda kind: pytest.fail("a worker was started"))
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 1 << 20)
    prepare(config(workers=0))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "sentencepiece-bpe"])
def test_a_tokenizer_is_trained_and_kept_beside_the_rows(config, tmp_path, kind):
    manifest = prepare(config(tokenizer=kind, vocab_size=320 if kind == "bpe" else 60)).manifest
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.tokenizer().sha256 == manifest.tokenizer_sha256 and manifest.counts["unknown_share"] == 0
    assert "cat" in corpus.tokenizer().decode(all_rows(corpus, "train")[0]) + " cat"
    assert all_rows(corpus, "train").max() < manifest.vocab_size == corpus.tokenizer().vocab_size


def test_the_tokenizers_sample_is_spread_evenly_over_the_lines():
    lines = [f"line {n:05d}" for n in range(10_000)]
    sample = module._sample(iter(lines), characters=20_000, block_size=100)
    assert sum(map(len, sample)) <= 20_300
    thirds = np.histogram([int(line[5:]) for line in sample], bins=3, range=(0, 10_000))[0]
    assert thirds.min() > 0.95 * thirds.max()
    assert module._sample(iter(lines[:50]), characters=20_000, block_size=100) == lines[:50]


def test_the_last_document_of_a_small_corpus_is_held_out(config, tmp_path):
    (tmp_path / "a.txt").write_text("one cat\n\ntwo cat\n\nbig dog")
    prepare(config(texts=(str(tmp_path / "a.txt"),)))
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.tokenizer().decode(all_rows(corpus, "valid")[0]) == "big dog"
    assert corpus.manifest.splits["train"].documents == 2


def test_a_single_document_and_no_holdout_leave_valid_empty(config, tmp_path):
    (tmp_path / "a.txt").write_text("one cat\ntwo cat")
    prepare(config(texts=(str(tmp_path / "a.txt"),)))
    assert Corpus.open(tmp_path / "out").size("valid") == 0
    prepare(config(holdout=0.0, out=str(tmp_path / "out2")))
    assert Corpus.open(tmp_path / "out2").size("valid") == 0


def test_texts_for_evaluation_can_be_named(config, tmp_path):
    manifest = prepare(config(texts=(str(tmp_path / "a.txt"),), valid=(str(tmp_path / "b.txt"),))).manifest
    assert (manifest.splits["train"].documents, manifest.splits["valid"].documents) == (200, 100)


KILLED = """
import os, signal, sys
from electrax.data import prepare as module
from electrax.data import shards
if __name__ == "__main__":
    vars(module).update(eval(sys.argv[3]))
    left = int(sys.argv[2])
    def kill(progress):
        global left
        left -= progress.stage == "rows"
        if left == 0:
            import multiprocessing
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    module.prepare(eval(sys.argv[1], {"PrepareConfig": module.PrepareConfig}), kill)
"""


def run_and_kill(config, chunks, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), repr(config), str(chunks), repr(SMALL)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done


@pytest.mark.parametrize("layout", ["packed", "segments"])
def test_killed_again_and_again_it_goes_on_to_the_same_bytes(config, tmp_path, layout):
    (tmp_path / "b.txt").write_bytes(b"\xff\n" + (tmp_path / "b.txt").read_bytes() + b"\n\xff\n")
    settings = {"layout": layout, "on_bad_input": "skip", "tokenizer": "wordpiece", "vocab_size": 60, "shard_mb": 2}
    whole = prepare(config(out=str(tmp_path / "whole"), **settings))
    assert whole.manifest.counts["skipped"] == {"utf8": 2} and len(whole.manifest.splits["train"].shards) > 5
    for chunks in (1, 3, 6):  # saved are 0, 2 and 4 of them: the rest is cut off and made again
        assert run_and_kill(config(**settings), chunks, tmp_path).returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    state = json.loads((tmp_path / "out.partial" / "progress.json").read_text())["state"]
    assert state["documents"] > 50
    assert run_and_kill(config(**settings), 1000, tmp_path).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_of_a_killed_run_go_away_and_another_number_of_them_may_go_on(config, tmp_path):
    prepare(config(out=str(tmp_path / "whole")))
    workers = run_and_kill(config(workers=2), 3, tmp_path).stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    prepare(config())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stop_after(chunks):
    def progress(_):
        nonlocal chunks
        chunks -= 1
        if chunks < 0:
            raise KeyboardInterrupt

    return progress


def test_another_command_or_other_input_does_not_go_on(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(config(), stop_after(5))
    with pytest.raises(UserError, match=r"out.partial: made by another command \(layout, max_length changed\)"):
        prepare(config(layout="segments", max_length=8))
    with open(tmp_path / "b.txt", "a") as file:
        file.write("more")
    with pytest.raises(UserError, match=r"made by another command \(the input files changed\)"):
        prepare(config())


def test_a_damaged_account_of_the_progress_is_named_and_not_gone_on_from(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(config(), stop_after(5))
    path = tmp_path / "out.partial" / "progress.json"
    whole = path.read_text()
    for damaged in (whole.replace('"documents": ', '"documents": 1'), whole[: len(whole) // 2]):
        assert damaged != whole
        path.write_text(damaged)
        with pytest.raises(UserError, match="out.partial/progress.json: (damaged; remove|not JSON)"):
            prepare(config())


def test_a_run_that_came_to_nothing_does_not_bind_the_next(config, tmp_path):
    with pytest.raises(UserError, match="tokenizer: expected"):
        prepare(config(tokenizer="gone.txt"))
    prepare(config())


def test_a_shard_that_lost_bytes_is_not_filled_up(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(config(), stop_after(5))
    os.truncate(tmp_path / "out.partial" / "train-00000.bin", 1)
    with pytest.raises(UserError, match=r"train-00000.bin: expected at least \d+ bytes; remove"):
        prepare(config())


def test_an_empty_file_is_found_before_the_work_begins(config, tmp_path):
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match="b.txt: expected text, found an empty file"):
        prepare(config())
    assert not (tmp_path / "out.partial").exists()
    assert prepare(config(on_bad_input="skip")).manifest.counts["skipped"] == {"empty": 1}


def test_a_directory_that_is_not_ours_is_left_alone(config, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(UserError, match="out.partial: expected an interrupted run's progress.json"):
        prepare(config())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: exists already"):
        prepare(config())


def test_two_runs_do_not_work_in_one_directory(config, tmp_path):
    def second_run(_):
        with pytest.raises(UserError, match="another `prepare` is at work"):
            prepare(config())

    prepare(config(), second_run)


def test_a_full_disk_names_the_path_and_the_work_goes_on_afterwards(config, tmp_path, monkeypatch):
    prepare(config(out=str(tmp_path / "whole")))
    write, left = storage.write_all, 12

    def full(file, data):
        nonlocal left
        left -= 1
        if left < 0:
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    for place in (shards, storage):
        monkeypatch.setattr(place, "write_all", full)
    with pytest.raises(UserError, match="out.partial: the disk is full"):
        prepare(config())
    for place in (shards, storage):
        monkeypatch.setattr(place, "write_all", write)
    prepare(config())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bad_input_stops_the_run_and_it_may_go_on_skipping(config, tmp_path):
    with open(tmp_path / "b.txt", "ab") as file:
        file.write(b"\n\nbad \xff line\n\nthe cat")
    with pytest.raises(UserError, match=r"b.txt, line \d+, byte 5: expected UTF-8, found 0xff"):
        prepare(config(holdout=0.0))
    report = prepare(config(holdout=0.0, on_bad_input="skip"))
    assert report.manifest.counts["skipped"] == {"utf8": 1} and report.manifest.splits["train"].documents == 301


def test_text_without_tokens_is_an_error(config, tmp_path):
    (tmp_path / "a.txt").write_text("\u200b\n")
    with pytest.raises(UserError, match="no rows came of it"):
        prepare(config(texts=(str(tmp_path / "a.txt"),)))


@pytest.mark.parametrize(
    "key, value", [("max_length", 4), ("holdout", 0.6), ("texts", ()), ("workers", -1), ("tokenizer", "sentencepeice")]
)
def test_a_wrong_setting_names_its_key(config, key, value):
    with pytest.raises(UserError, match=f"{key}: expected"):
        prepare(config(**{key: value}))


def test_a_long_line_is_encoded_in_parts_without_changing_a_token(config, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    line = " ".join(WORDS * 50)
    from electrax.data import encode

    whole = encode.encode_lines(tokenizer, [line, "cat"])
    monkeypatch.setattr(encode, "PART", 50)
    monkeypatch.setattr(encode, "BATCH", 120)
    parts = encode.encode_lines(tokenizer, [line, "cat"])
    assert len(encode.split_long(line)) > 50 and parts == whole and whole.lengths == [900, 1]


def test_progress_reaches_all_of_the_input(config):
    seen = []
    report = prepare(config(), seen.append)
    assert seen[0].stage == "tokenizer" and [p.share for p in seen] == sorted(p.share for p in seen)
    assert seen[-1].share == 1 and seen[-1].documents == 300
    assert report.text_mb == pytest.approx(report.manifest.counts["text_bytes"] / 1e6) and report.seconds > 0
