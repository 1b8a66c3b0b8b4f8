"""Every reader of files from outside gives what it read, or refuses it in one line that names the file."""

import gzip
import io
import json
import lzma
import pathlib

import hypothesis
import numpy as np
import pytest
import zstandard
from hypothesis import strategies as st

from electrax.config import load, to_toml
from electrax.data.conll import read_conll, read_conllu
from electrax.data.corpus import Corpus
from electrax.data.examples import BadRows, find_classes
from electrax.data.glue import GLUE, read_glue
from electrax.data.prepare import PrepareConfig, prepare
from electrax.data.readers import LineReader, find_sources
from electrax.data.squad import iter_squad, read_mrqa, read_squad
from electrax.data.tables import read_table
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import FinetuneConfig, PretrainConfig
from tests.fuzzing import as_json, changed, damaged, lines_of, read_or_refuse, settings

CSV = b'text,label\n"A good, long film.",good\n"Two\nlines ""quoted""",bad\nplain,\xc3\xa9\n'
TSV = b'text\tlabel\nA "good" film.\tgood\n"quoted"\tbad\n'
ROWS = [{"text": "one", "label": "a"}, {"text": "two\nlines", "label": ["a", "b"]}, {"text": "three", "label": 3}]
SQUAD = {"version": "1", "data": [{"title": "t", "paragraphs": [{"context": "It is in Bonn.", "qas": [
    {"id": "q1", "question": "Where?", "answers": [{"text": "Bonn", "answer_start": 9}], "is_impossible": False},
    {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True}]}]}]}  # fmt: skip
MRQA = [{"header": {"dataset": "x"}}, {"context": "It is in Bonn.", "qas": [{"qid": "q1", "question": "Where?",
    "answers": ["Bonn", "bonn"], "detected_answers": [{"text": "Bonn", "char_spans": [[9, 12]]}]}]}]  # fmt: skip
CONLL = b"-DOCSTART- -X- O O\n\nBonn NNP B-NP B-LOC\nis VBZ B-VP O\n\nHere RB B-AP O\n"
CONLLU = (
    b"# sent_id = s1\n1-2\tIm\t_\t_\t_\t_\t_\t_\t_\t_\n1\tIn\tin\tADP\tIN\t_\t3\tcase\t_\t_\n"
    b"2\tdem\tder\tDET\tDT\t_\t3\tdet\t_\t_\n2.1\te\t_\t_\t_\t_\t_\t_\t_\t_\n"
    b"3\tHaus\tHaus\tNOUN\tNN\t_\t0\troot\t_\t_\n"
)
GLUE_FILES = {
    "cola": b"gj04\t1\t\tThe cat sat.\nks08\t0\t*\tCat the sat.\n",
    "stsb": b"index\tsentence1\tsentence2\tscore\n0\tA man.\tThe man.\t4.500\n",
}
TEXT = b"One line.\nAnother line.\n\nA second document, in \xc3\xa4.\n"
CONFIGS = {
    FinetuneConfig: b'task = "classify"\nworkdir = "runs/a"\nseeds = 2\nepochs = 2.5\n[head]\nkind = "classes"\n'
    b'[data]\npath = "reviews.csv"\ntext = ["text"]\n[optimizer]\nlr = 1e-4\n',
    PretrainConfig: b'workdir = "runs/b"\nsteps = 100\n[model]\nsize = "small"\n[data]\npath = "sample"\n'
    b"holdout = 0.1\n[objective]\nmask_prob = 0.15\n",
}
SKIP = st.sampled_from(("error", "skip"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def compressed(kind: str, data: bytes) -> bytes:
    return {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress, "": bytes}[kind](data)


def write(folder: pathlib.Path, name: str, data: bytes) -> pathlib.Path:
    (folder / name).write_bytes(data)
    return folder / name


def read_rows(path: pathlib.Path, on_bad_row: str, read) -> None:
    """As the commands do: all rows, and then one error for the bad ones."""

    def whole() -> None:
        bad = BadRows(on_bad_row)
        find_classes([row for row in read(path, bad) if hasattr(row, "label")])
        bad.close(path)

    read_or_refuse(whole, path)


JSON_LINES = lines_of(ROWS) | damaged(b"\n".join(map(as_json, ROWS)))
TABLES = {"a.csv": damaged(CSV), "a.tsv": damaged(TSV), "a.jsonl": JSON_LINES}


@pytest.mark.parametrize("name", TABLES)
@hypothesis.given(st.data(), SKIP, st.sampled_from(("", ";")))
@settings
def test_tables(folder, name, data, on_bad_row, separator):
    path = write(folder, name, data.draw(TABLES[name]))
    for columns in (("text",), ("0",), ("text", "label")):
        label = "1" if columns == ("0",) else "label"
        read_rows(path, on_bad_row, lambda p, bad: read_table(p, columns, label, bad, separator))  # noqa: B023


@hypothesis.given(damaged(TEXT), SKIP)
@settings
def test_lines_of_text(folder, data, on_bad_row):
    path = write(folder, "a.txt", data)
    read_rows(path, on_bad_row, lambda p, bad: read_table(p, ("text",), "", bad))


@pytest.mark.parametrize("kind", [".gz", ".xz", ".zst"])
@hypothesis.given(st.data(), SKIP)
@settings
def test_compressed_tables_and_texts(folder, kind, data, on_bad_row):
    content = data.draw(damaged(CSV).map(lambda text: compressed(kind, text)) | damaged(compressed(kind, CSV)))
    path = write(folder, f"a.csv{kind}", content)
    read_rows(path, on_bad_row, lambda p, bad: read_table(p, ("text",), "label", bad))
    path = write(folder, f"a.txt{kind}", content)
    read_or_refuse(lambda: list(LineReader(find_sources((str(path),)), on_bad_row).read()), path)


@pytest.fixture(scope="module")
def parquet():
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    table = pyarrow.table({"text": ["one", "two", None], "label": [1, 2, 3], "more": [["a"], [], ["b"]]})
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


@hypothesis.given(st.data(), SKIP)
@settings
def test_parquet_files(folder, parquet, data, on_bad_row):
    path = write(folder, "a.parquet", data.draw(damaged(parquet)))
    for label in ("label", "more"):
        read_rows(path, on_bad_row, lambda p, bad: read_table(p, ("text",), label, bad))  # noqa: B023


@hypothesis.given(changed(SQUAD).map(as_json) | damaged(as_json(SQUAD)), SKIP)
@settings
def test_squad_files(folder, data, on_bad_row):
    path = write(folder, "a.json", data)
    read_rows(path, on_bad_row, read_squad)
    read_or_refuse(lambda: list(iter_squad(path, answers=False)), path)


@hypothesis.given(lines_of(MRQA) | damaged(b"\n".join(map(as_json, MRQA))), SKIP)
@settings
def test_mrqa_files(folder, data, on_bad_row):
    read_rows(write(folder, "a.jsonl", data), on_bad_row, read_mrqa)


@hypothesis.given(damaged(CONLL), damaged(CONLLU), SKIP)
@settings
def test_conll_files(folder, conll, conllu, on_bad_row):
    read_rows(write(folder, "a.conll", conll), on_bad_row, read_conll)
    read_rows(write(folder, "a.conllu", conllu), on_bad_row, read_conllu)


@pytest.mark.parametrize("name", GLUE_FILES)
@hypothesis.given(st.data(), SKIP)
@settings
def test_glue_files(folder, name, data, on_bad_row):
    task = GLUE[name]
    (folder / task.title).mkdir(exist_ok=True)
    path = write(folder / task.title, "train.tsv", data.draw(damaged(GLUE_FILES[name])))
    read_rows(path, on_bad_row, lambda p, bad: read_glue(folder, task, "train", bad))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@hypothesis.given(st.data(), SKIP, st.sampled_from(("blank_line", "file")))
@settings
def test_texts_to_prepare(folder, name, data, on_bad_input, documents):
    content = data.draw(damaged(TEXT) if name == "a.txt" else JSON_LINES)
    path = write(folder, name, content)
    read_or_refuse(lambda: list(LineReader(find_sources((str(path),), documents), on_bad_input).read()), path)


@pytest.mark.parametrize("kind", CONFIGS)
@hypothesis.given(st.data())
@settings
def test_configs_are_refused_or_read_back_as_they_were(folder, kind, data):
    path = write(folder, "a.toml", data.draw(damaged(CONFIGS[kind])))
    (folder / "b.toml").write_bytes(b'base = "a.toml"\n')
    config = read_or_refuse(lambda: load(kind, path), None)  # keys that do not go together are named without the file
    if config is not None:
        path.write_text(to_toml(config))
        assert load(kind, path) == config
        assert load(kind, folder / "b.toml") == config


@pytest.fixture(scope="module")
def corpus(folder):
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"the cat number {n} sat on mat {n * n}" for n in range(60)))
    prepare(PrepareConfig((str(text),), str(folder / "corpus"), vocab_size=60, max_length=8, workers=1))
    return folder / "corpus"


@hypothesis.given(st.data())
@settings
def test_manifests(corpus, data):
    path = corpus / "manifest.json"
    good = path.read_bytes()
    try:
        path.write_bytes(data.draw(changed(json.loads(good)).map(as_json) | damaged(good)))
        read_or_refuse(lambda: _read_corpus(corpus), corpus)
    finally:
        path.write_bytes(good)


def _read_corpus(path: pathlib.Path) -> None:
    opened = Corpus.open(path)
    for split in opened.manifest.splits:
        size = opened.size(split)
        assert opened.rows(split, np.unique([-1, 0, size - 1])[: size + 1]).shape[1] == opened.manifest.max_length
    opened.verify()
    opened.tokenizer()


@hypothesis.given(st.data())
@settings
def test_tokenizers(folder, corpus, data):
    good = (corpus / "tokenizer.json").read_bytes()
    path = write(folder, "tokenizer.json", data.draw(changed(json.loads(good)).map(as_json) | damaged(good)))
    tokenizer = read_or_refuse(lambda: Tokenizer.load(path), path)
    if tokenizer is not None:
        tokenizer.encode_batch(["the cat [MASK]", ""])
    words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n##s\n"
    path = write(folder, "vocab.txt", data.draw(damaged(words)))
    read_or_refuse(lambda: Tokenizer.load(path, None), path)
