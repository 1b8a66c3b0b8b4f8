"""The Beam pipeline makes the local command's corpus; its parts do so without Beam, in any order."""

import collections
import gzip
import importlib.util
import json
import pathlib
import random

import numpy as np
import pytest

from electrax.config import UserError
from electrax.data import prepare as preparing
from electrax.data.beam import (
    Job,
    _add_up,
    chain,
    count,
    effects,
    encode,
    lay,
    prepare_with_beam,
    read,
    totals,
    write,
)
from electrax.data.corpus import MANIFEST_FILE, Manifest
from electrax.data.prepare import (
    PrepareConfig,
    State,
    check,
    every_of,
    make_manifest,
    make_tokenizer,
    prepare,
    rows_in_shard,
)
from electrax.data.tokenizer import Tokenizer

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None


def document(chance: random.Random) -> str:
    words = [a + b + c for a in "bdfgkl" for b in "aeiou" for c in "kmnt"]
    return "\n".join(" ".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(chance.randint(1, 6)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """Plain, compressed and JSON-lines texts, one shorter than a row, one of empty documents around two others."""
    folder, chance = tmp_path_factory.mktemp("texts"), random.Random(0)
    some = lambda number: "\n\n".join(document(chance) for _ in range(number))  # noqa: E731
    (folder / "a.txt").write_text(some(40))
    (folder / "b.txt").write_text("ba")
    (folder / "c.txt").write_text(f"\n\n\n\n{document(chance)}\n\n\n\n{document(chance)}\n")
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": document(chance)}) + "\n" for _ in range(20)))
    with gzip.open(folder / "e.txt.gz", "wt") as file:
        file.write(some(30))
    (folder / "held.txt").write_text(some(5))
    return {path.stem.partition(".")[0]: str(path) for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def small_chunks_and_shards(monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 700)
    monkeypatch.setattr(preparing, "MEGABYTE", 1000)


CASES = [
    {"layout": "packed", "holdout": 0.1},
    {"layout": "segments", "holdout": 0.1},
    {"layout": "packed", "valid": True},
    {"layout": "segments", "holdout": 0.0, "max_length": 8},
]


def config_of(texts, out, layout, valid=False, **changes) -> PrepareConfig:
    trained = tuple(texts[name] for name in "abcde")
    held = (texts["held"],) if valid else ()
    values = {"vocab_size": 120, "max_length": 16, "workers": 1, "shard_mb": 1, "layout": layout} | changes
    return PrepareConfig(texts=trained, out=str(out), valid=held, **values)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def made_by_parts(config: PrepareConfig, chance: random.Random) -> dict[str, bytes]:
    """What the pipeline's functions make, called in a random order and gathered by hand."""
    train, valid = check(config)
    sources, out = [*train, *valid], pathlib.Path(config.out)
    (out / "scratch").mkdir(parents=True)
    make_tokenizer(config, train).save(out)
    tokenizer = Tokenizer.load(out)
    documents = [count(config, *numbered)["documents"] for numbered in enumerate(sources)]
    every = 0 if config.valid else every_of(config, sum(documents))
    job = Job(config, out, len(train), every, rows_in_shard(config, tokenizer))
    firsts = np.cumsum([0, *documents]).tolist()
    chunks = [chunk for n, source in enumerate(sources) for chunk in read(job, n, source, firsts[n])]
    assert len(chunks) > 10
    chance.shuffle(chunks)
    encoded = [(key, encode(job, chunk)) for key, chunk in chunks]
    places = dict(chain((key, effects(job, some)) for key, some in encoded))
    chance.shuffle(encoded)
    laid = collections.defaultdict(list)
    for key, some in encoded:
        for shard, piece in lay(job, some, places[key]):
            laid[shard].append(piece)
    results = [write(job, *shard, pieces) for shard, pieces in laid.items()] + [totals(some) for _, some in encoded]
    state = State()
    shards = _add_up(sorted(results, key=lambda result: result["order"]), state)
    (out / "scratch").rmdir()
    (out / MANIFEST_FILE).write_text(make_manifest(config, tokenizer, state, shards).dumps())
    return content(out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_parts_in_any_order_make_the_bytes_of_the_local_command(texts, tmp_path, case):
    prepare(config_of(texts, tmp_path / "local", **case))
    wanted = content(tmp_path / "local")
    assert made_by_parts(config_of(texts, tmp_path / "parts", **case), random.Random(1)) == wanted
    shards = Manifest.read(tmp_path / "local").splits["train"].shards
    assert len(shards) > 3


def test_a_bad_text_is_named_by_its_count(texts, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "ba"}\n{"txt": "ba"}\n')
    config = PrepareConfig(texts=(str(tmp_path / "bad.jsonl"),), out=str(tmp_path / "out"))
    [train, _] = check(config)
    assert "bad.jsonl" in count(config, 0, train[0])["error"]


@pytest.mark.skipif(HAS_BEAM, reason="it is installed here")
def test_without_beam_the_command_says_what_to_install(texts, tmp_path):
    with pytest.raises(UserError, match="beam: needs other libraries: pip install apache-beam"):
        prepare(config_of(texts, tmp_path / "out", "packed", beam="--runner=DirectRunner"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not HAS_BEAM, reason="apache-beam is not installed")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_pipeline_makes_the_bytes_of_the_local_command(texts, tmp_path, case):
    prepare(config_of(texts, tmp_path / "local", **case))
    prepare_with_beam(config_of(texts, tmp_path / "beam", **case), ["--runner=DirectRunner"])
    assert content(tmp_path / "beam") == content(tmp_path / "local")


@pytest.mark.skipif(not HAS_BEAM, reason="apache-beam is not installed")
def test_a_text_that_a_worker_refuses_is_one_error_and_leaves_nothing(texts, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "ba"}\n{"txt": "ba"}\n')
    config = PrepareConfig(texts=(texts["a"], str(tmp_path / "bad.jsonl")), out=str(tmp_path / "out"), vocab_size=100)
    with pytest.raises(UserError, match="bad.jsonl"):
        prepare_with_beam(config, ["--runner=DirectRunner"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]
