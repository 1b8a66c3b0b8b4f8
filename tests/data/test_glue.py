import pathlib

import pytest

from electrax.config import UserError
from electrax.data.examples import BadRows, check_labels, check_numbers
from electrax.data.glue import GLUE, read_glue, write_leaderboard

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "glue"


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path

    return write


def read(folder, task, split="train", skip=False):
    """([(id, texts, label)], counts of bad rows)."""
    bad = BadRows("skip" if skip else "error")
    rows = read_glue(folder, GLUE[task], split, bad)
    bad.close(folder)
    return [(row.id, row.texts, row.label) for row in rows], dict(bad.counts)


# One row of each file, as the official ones have them.
PARSES = "( a )\t( b )\t(ROOT a)\t(ROOT b)"
FILES = [
    ("cola", "CoLA", "train", "train.tsv", "gj04\t1\t*\tOne more.\n", ("", ("One more.",), "1")),
    ("cola", "CoLA", "dev", "dev.tsv", "gj04\t0\t\tOne more.\n", ("", ("One more.",), "0")),
    ("cola", "CoLA", "test", "test.tsv", "index\tsentence\n7\tOne.\n", ("7", ("One.",), None)),
    ("sst2", "SST-2", "train", "train.tsv", "sentence\tlabel\nit 's good \t1\n", ("", ("it 's good ",), "1")),
    ("sst2", "SST-2", "test", "test.tsv", "index\tsentence\n0\tbad .\n", ("0", ("bad .",), None)),
    (
        "mrpc", "MRPC", "train", "train.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t12\t13\tA \"b.\t\"C d.\r\n",
        ("", ('A "b.', '"C d.'), "1"),
    ),
    (
        "mrpc", "MRPC", "test", "test.tsv",
        "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n3\t12\t13\tA b.\tC d.\n", ("3", ("A b.", "C d."), None),
    ),
    (
        "stsb", "STS-B", "dev", "dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "4\tnews\tf\t2012\t1\tnone\tnone\tA b.\tC d.\t3.250\n", ("4", ("A b.", "C d."), "3.250"),
    ),
    (
        "stsb", "STS-B", "test", "test.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
        "4\tnews\tf\t2012\t1\tnone\tnone\tA b.\tC d.\n", ("4", ("A b.", "C d."), None),
    ),
    (
        "qqp", "QQP", "train", "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n9\t1\t2\tWhy?\tWhat?\t0\n", ("9", ("Why?", "What?"), "0"),
    ),
    ("qqp", "QQP", "test", "test.tsv", "id\tquestion1\tquestion2\n9\tWhy?\tWhat?\n", ("9", ("Why?", "What?"), None)),
    (
        "mnli", "MNLI", "train", "train.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        f"sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n5\t1\t1n\tfiction\t{PARSES}\tA.\tB.\tneutral\t"
        "entailment\n", ("5", ("A.", "B."), "entailment"),
    ),
    (
        "mnli", "MNLI", "dev", "dev_matched.tsv",
        "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n5\tA.\tB.\tneutral\tneutral\tcontradiction\n",
        ("5", ("A.", "B."), "contradiction"),
    ),
    (
        "mnli", "MNLI", "dev_mismatched", "dev_mismatched.tsv",
        "index\tsentence1\tsentence2\tgold_label\n6\tA.\tB.\tneutral\n", ("6", ("A.", "B."), "neutral"),
    ),
    ("mnli", "MNLI", "test", "test_matched.tsv", "index\tsentence1\tsentence2\n1\tA.\tB.\n", ("1", ("A.", "B."), None)),
    (
        "mnli", "MNLI", "test_mismatched", "test_mismatched.tsv",
        "index\tsentence1\tsentence2\n1\tA.\tB.\n", ("1", ("A.", "B."), None),
    ),
    (
        "mnli", "MNLI", "diagnostic", "diagnostic.tsv",
        "index\tsentence1\tsentence2\n1\tA.\tB.\n", ("1", ("A.", "B."), None),
    ),
    (
        "qnli", "QNLI", "dev", "dev.tsv",
        "index\tquestion\tsentence\tlabel\n2\tWhy?\tSo.\tnot_entailment\n", ("2", ("Why?", "So."), "not_entailment"),
    ),
    (
        "rte", "RTE", "train", "train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n", ("0", ("A.", "B."), "entailment"),
    ),
    (
        "wnli", "WNLI", "train", "train.tsv",
        "index\tsentence1\tsentence2\tlabel\n\n0\tA.\tB.\t1\n\n", ("0", ("A.", "B."), "1"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("task, folder, split, file, text, row", FILES, ids=[f"{f[0]}-{f[2]}" for f in FILES])
def test_each_file_is_read_by_its_own_columns(write, task, folder, split, file, text, row):
    home = write(f"{folder}/{file}", text)
    assert read(home, task, split) == ([row], {})
    assert read(home / folder, task, split) == ([row], {})
    if row[2] is not None and GLUE[task].classes:
        assert row[2] in GLUE[task].classes


@pytest.mark.parametrize("name", ["sst-2", "SST2", "sst_2"])
def test_a_folder_may_be_spelled_in_other_ways(write, name):
    assert len(read(write(f"{name}/dev.tsv", "sentence\tlabel\nfine\t1\n"), "sst2", "dev")[0]) == 1


def test_the_diagnostic_set_may_have_its_own_folder(write):
    home = write("diagnostic/diagnostic.tsv", "index\tsentence1\tsentence2\n1\tA.\tB.\n")
    (home / "MNLI").mkdir()
    for folder in (home, home / "MNLI"):
        assert read(folder, "mnli", "diagnostic")[0] == [("1", ("A.", "B."), None)]


HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


@pytest.mark.parametrize(
    "row, kind, message",
    [
        ("9\t1\t2\tWhy?", "ragged row", "expected 6 cells, found 4"),
        ("9\t1\t2\tWhy?\tWhat?\t0\t1", "ragged row", "expected 6 cells, found 7"),
        (" ", "ragged row", "expected 6 cells, found 1"),
        ("9\t1\t2\tWhy?\t \t0", "empty text", "expected text in column 'question2', found none"),
        ("9\t1\t2\tWhy?\tWhat?\t", "label", "expected a label in column 'is_duplicate', found none"),
        ("9\t1\t2\tWh\0y?\tWhat?\t0", "NUL byte", "expected UTF-8 text, found a NUL byte"),
        (b"9\t1\t2\tWhy?\t\xff?\t0", "encoding", "byte 12: expected UTF-8, found 0xff"),
    ],
)
def test_bad_rows_are_named_by_line_or_left_out(write, row, kind, message):
    good = b"1\t1\t2\tWhy?\tWhat?\t0\n"
    home = write(
        "QQP/dev.tsv", HEADER.encode() + good + (row if isinstance(row, bytes) else row.encode()) + b"\n" + good
    )
    with pytest.raises(UserError, match=rf"1 bad row \(1 {kind}\): .*QQP/dev.tsv, line 3: {message}"):
        read(home, "qqp", "dev")
    rows, counts = read(home, "qqp", "dev", skip=True)
    assert len(rows) == 2 and counts == {kind: 1}


def test_files_that_make_no_sense_are_refused_at_once(write, tmp_path):
    home = write("RTE/train.tsv", "index\tsentence1\tsentence2\n0\tA.\tB.\n")
    with pytest.raises(UserError, match="RTE/train.tsv, line 1: expected a header with label; found 'index, sentence1"):
        read(home, "rte", skip=True)
    with pytest.raises(UserError, match="expected the file RTE/dev.tsv in it"):
        read(home, "rte", "dev")
    with pytest.raises(UserError, match="expected the file WNLI/train.tsv in it"):
        read(home / "RTE", "wnli")  # another task's folder
    with pytest.raises(UserError, match="RTE: expected one of the splits train, dev, test, found 'dev_mismatched'"):
        read(home, "rte", "dev_mismatched")
    with pytest.raises(UserError, match="nothing: expected a folder with GLUE's files"):
        read(home / "nothing", "rte")


def test_a_header_that_cannot_be_read_is_refused_at_once(write):
    home = write("RTE/train.tsv", b"index\tsentence1\tsentence2\tlabel\xff\n0\tA.\tB.\t1\n")
    with pytest.raises(UserError, match="RTE/train.tsv, line 1: byte 32: expected UTF-8, found 0xff"):
        read(home, "rte", skip=True)


def test_the_tasks_have_the_settings_of_the_reference():
    assert {name for name, task in GLUE.items() if task.both_orders} == {"mrpc", "stsb"}
    assert {name: task.metrics[0] for name, task in GLUE.items() if task.metrics[0] != "accuracy"} == {
        "cola": "matthews",
        "stsb": "spearman",
    }
    assert GLUE["mrpc"].metrics == GLUE["qqp"].metrics == ("accuracy", "f1")
    assert GLUE["mnli"].classes == ("contradiction", "entailment", "neutral")
    assert GLUE["rte"].classes == GLUE["qnli"].classes == ("entailment", "not_entailment")
    assert GLUE["stsb"].classes == () and GLUE["wnli"].classes == ("0", "1")


def test_leaderboard_files_have_the_names_that_it_wants():
    unlabelled = [(task, split) for task in GLUE.values() for split in ("test", "test_mismatched", "diagnostic")]
    assert sorted(task.leaderboard_file(split) for task, split in unlabelled if split in task.splits) == [
        "AX.tsv", "CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "MRPC.tsv", "QNLI.tsv", "QQP.tsv", "RTE.tsv", "SST-2.tsv",
        "STS-B.tsv", "WNLI.tsv",
    ]  # fmt: skip


def test_leaderboard_files_hold_index_and_prediction(tmp_path):
    path = tmp_path / "RTE.tsv"
    write_leaderboard(GLUE["rte"], ["0", "1"], ["entailment", "not_entailment"], path)
    assert path.read_bytes() == b"index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    write_leaderboard(GLUE["stsb"], ["0", "1"], [2.5, 4.9996], tmp_path / "STS-B.tsv")
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t2.500\n1\t5.000\n"
    write_leaderboard(GLUE["cola"], ["5"], ["1"], tmp_path / "CoLA.tsv")
    assert (tmp_path / "CoLA.tsv").read_text() == "index\tprediction\n5\t1\n"


def test_a_wrong_prediction_leaves_the_old_leaderboard_file(tmp_path):
    path = tmp_path / "RTE.tsv"
    path.write_text("old")
    with pytest.raises(ValueError, match="RTE: expected one of entailment, not_entailment, found '1'"):
        write_leaderboard(GLUE["rte"], ["0"], ["1"], path)
    with pytest.raises(ValueError):
        write_leaderboard(GLUE["rte"], ["0", "1"], ["entailment"], path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["RTE.tsv"]


@pytest.mark.skipif(not REAL.exists(), reason="the benchmark's files are not here")
@pytest.mark.parametrize(
    "task, split, rows",
    [
        ("cola", "train", 8551), ("cola", "dev", 1043), ("cola", "test", 1063),
        ("sst2", "train", 67349), ("sst2", "dev", 872), ("sst2", "test", 1821),
        ("mrpc", "train", 3668), ("mrpc", "dev", 408), ("mrpc", "test", 1725),
        ("stsb", "train", 5749), ("stsb", "dev", 1500),
        ("qnli", "dev", 5463), ("qnli", "test", 5463),
        ("rte", "train", 2490), ("rte", "dev", 277), ("rte", "test", 3000),
        ("wnli", "train", 635), ("wnli", "dev", 71), ("wnli", "test", 146),
    ],
)  # fmt: skip
def test_the_benchmarks_files_have_the_official_number_of_rows(task, split, rows):
    bad = BadRows("error")
    examples = read_glue(REAL, GLUE[task], split, bad)
    assert len(examples) == rows
    if split == "test":
        assert {e.label for e in examples} == {None} and [e.id for e in examples[:2]] == ["0", "1"]
    elif GLUE[task].classes:
        assert len(check_labels(examples, GLUE[task].classes, bad)) == rows
    else:
        assert len(check_numbers(examples, bad)) == rows
    assert not bad.counts
