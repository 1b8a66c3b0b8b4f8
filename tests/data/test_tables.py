import decimal
import gzip
import json
import shutil
import sys

import numpy as np
import pytest

from electrax.config import UserError
from electrax.data import examples
from electrax.data.examples import Answer, BadRow, BadRows
from electrax.data.tables import iter_table, read_questions, read_table, read_tagged


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        data = data.encode() if isinstance(data, str) else data
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def read(path, text=("text",), label="label", skip=False, **settings):
    """([(line, texts, label)], counts of bad rows)."""
    bad = BadRows("skip" if skip else "error")
    rows = read_table(path, text, label, bad, **settings)
    bad.close(path)
    return [(int(row.where.split()[-1]), row.texts, row.label) for row in rows], dict(bad.counts)


def rows(path, text=("text",), label="label", **settings):
    found, counts = read(path, text, label, **settings)
    assert counts == {}
    return [row[1:] for row in found]


# -- CSV and TSV ------------------------------------------------------------------------------------------------------

CSV = '\ufefflabel,text,n\r\npos,"fine, and ""so"" on",1\r\n\r\nneg,"two\nlines",2\r\n pos ,last,3'


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.CSV"])
def test_csv_cells_may_be_quoted_and_rows_are_named_by_their_first_line(write, name):
    expected = [(2, ('fine, and "so" on',), "pos"), (4, ("two\nlines",), "neg"), (6, ("last",), "pos")]
    assert read(write(name, CSV)) == (expected, {})


def test_a_row_is_named_by_file_and_line(write):
    path = write("a.csv", CSV)
    assert next(iter_table(path, ("text",))).where == f"{path}, line 2"


def test_cells_of_a_tsv_may_be_quoted_as_those_of_a_csv(write):
    path = write("a.tsv", 'label\ttext\npos\t"two\n\nlines"\r\nneg\t"a\ttab, ""so"""\npos\tlast\n')
    expected = [(2, ("two\n\nlines",), "pos"), (5, ('a\ttab, "so"',), "neg"), (6, ("last",), "pos")]
    assert read(path) == (expected, {})
    assert rows(write("b.tsv", 'text\n"two\nlines"\n'), label="") == [(("two\nlines",), None)]


def test_a_fault_in_a_line_of_a_quoted_tsv_cell_is_one_of_its_row(write):
    path = write("a.tsv", b'label\ttext\npos\t"two\n\xff lines"\nneg\tlast\n')
    assert read(path, skip=True) == ([(4, ("last",), "neg")], {"encoding": 1})


@pytest.mark.parametrize("first, second", [('"open', 'closed"'), ('"open', "so"), ('"open', '"so" and so'), ("a", '"')])
def test_lines_of_a_tsv_that_are_rows_by_themselves_stay_rows(write, first, second):
    path = write("a.tsv", f"text\tlabel\n{first}\tx\n{second}\ty\nthree\tz\n")
    assert rows(path) == [((first,), "x"), ((second,), "y"), (("three",), "z")]


def test_a_row_of_a_tsv_is_a_line_whatever_its_quotation_marks(write):
    path = write("a.tsv", 'text\tlabel\nsay "so", then\tx\n"open\ty\n"so ""called"""\tz\n"yes" or "no"\tz\n')
    expected = [('say "so", then', "x"), ('"open', "y"), ('so "called"', "z"), ('"yes" or "no"', "z")]
    assert rows(path) == [((text,), label) for text, label in expected]


def test_columns_are_taken_in_the_order_asked_for(write):
    path = write("a.csv", "d,c,b,a,label\n1,2,3,4,x\n")
    assert rows(path, ("a", "b")) == [(("4", "3"), "x")]
    assert rows(path, ("c", "d", "a", "b")) == [(("2", "1", "4", "3"), "x")]
    assert rows(path, ("b",), label="") == [(("3",), None)]


def test_columns_named_by_numbers_are_of_a_file_without_header(write):
    path = write("a.csv", "one,x,1\ntwo,y,2\n")
    assert rows(path, ("0",), "2") == [(("one",), "1"), (("two",), "2")]
    with pytest.raises(UserError, match="a.csv, line 1: expected at least 4 columns, found 3"):
        read(path, ("0",), "3")


def test_labels_are_split_at_the_separator(write):
    path = write("a.csv", 'text,label\none,"b;a ; b"\ntwo,\nthree,c\n')
    assert [label for _, label in rows(path, label_separator=";")] == [("b", "a"), (), ("c",)]
    assert read(path, skip=True)[1] == {"label": 1}


def test_a_limit_stops_the_reading(write):
    path = write("a.csv", "text,label\none,a\ntwo,b\n\0,\0\n")
    assert len(rows(path, limit=2)) == 2


@pytest.mark.parametrize(
    "row, kind, message",
    [
        ("only", "ragged row", "expected 2 cells, found 1"),
        ("a,b,c", "ragged row", "expected 2 cells, found 3"),
        ('a,b,"c\nd"', "ragged row", r"expected 2 cells, found 3 in lines 3 to 4 \(quotation marks\?\)"),
        (" \t,x", "empty text", "expected text in column 'text', found none"),
        ("some, ", "label", "expected a label in column 'label', found ' '"),
        ("a\0b,x", "NUL byte", "expected UTF-8 text, found a NUL byte"),
        (b"ab\xffc,x", "encoding", "byte 3: expected UTF-8, found 0xff"),
        (b'"a\nb\xff\nc",x', "encoding", "byte 2: expected UTF-8, found 0xff"),
        ('"a"b,x', "quotes", "expected cells that are quoted as a whole or not at all"),
        ("a\rb,x", "quotes", "expected cells that are quoted as a whole or not at all"),
    ],
)
def test_bad_rows_of_a_csv_file_are_named_by_line_or_left_out(write, row, kind, message):
    row = row if isinstance(row, bytes) else row.encode()
    path = write("a.csv", b"text,label\none,x\n" + row + b"\nthree,y\n")
    with pytest.raises(UserError, match=rf"1 bad row \(1 {kind}\): .*a.csv, line 3: {message}"):
        read(path)
    found, counts = read(path, skip=True)
    assert [texts for _, texts, _ in found] == [("one",), ("three",)] and counts == {kind: 1}


def test_all_bad_rows_are_found(write):
    path = write("a.csv", "text,label\n,x\na\n,y\n")
    with pytest.raises(UserError, match=r"3 bad rows \(2 empty text, 1 ragged row\): .*line 2.*line 3.*line 4"):
        read(path)


def test_bad_rows_come_in_order_with_the_others(write):
    path = write("a.csv", "text\none\n \nthree\n")
    found = list(iter_table(path, ("text",)))
    assert [isinstance(row, BadRow) for row in found] == [False, True, False]
    assert found[1] == BadRow(f"{path}, line 3", "empty text", "expected text in column 'text', found none")


@pytest.mark.parametrize(
    "data, message",
    [
        ("", "a.csv: expected a header with the columns text, label, found an empty file"),
        ("text,label\n", "a.csv: expected rows, found none"),
        ("text,lable\n", r"a.csv: no column 'label'; did you mean 'lable'\? its columns are 'text', 'lable'$"),
        ("a,b\n", "a.csv: no column 'text'; its columns are 'a', 'b'$"),
        ("text\tlabel\na\tb\n", r"told apart by commas; these by tabs\?"),
        ("text;label\na;b\n", r"told apart by commas; these by semicolons\?"),
        ("text,label,text\n", "expected one column 'text', found 2"),
        ("text,label\none,x\n\"two,y\nthree,z\n", "a.csv, line 3: expected a cell to end, found none that does"),
        ("text,label\none,x\ntwo,\"y\nthree,z\n", "a.csv, line 3: expected a cell to end, found none that does"),
        ("text,label\none,x".encode("utf-16"), "a.csv, line 1: expected UTF-8 text, found a NUL byte"),
        (b"text,l\xe4bel\n", "a.csv, line 1: byte 7: expected UTF-8, found 0xe4"),
        ("text,label\rone,x\r", "a.csv, line 1: expected cells"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("skip", [False, True])
def test_a_csv_file_that_makes_no_sense_is_refused_at_once(write, data, message, skip):
    with pytest.raises(UserError, match=message):
        read(write("a.csv", data), skip=skip)


def test_a_tsv_file_with_commas_is_refused_by_its_delimiter(write):
    with pytest.raises(UserError, match=r"told apart by tabs; these by commas\?"):
        read(write("a.tsv", "text,label\na,b\n"))


def test_long_cells_are_read_up_to_a_limit(write, monkeypatch):
    path = write("a.csv", "text,label\n" + "x" * 500_000 + ",y\n")
    assert rows(path) == [(("x" * 500_000,), "y")]
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 1000)
    assert len(list(iter_table(path, ("text",)))) == 1
    assert next(iter_table(path, ("text",))).kind == "long line"


def test_a_stray_quotation_mark_does_not_swallow_a_huge_file(write):
    path = write("a.csv", 'text,label\n"one,x\n' + ("x" * (1 << 20) + ",y\n") * 17 + 'last","z"\n')
    with pytest.raises(UserError, match="a.csv, line 2: expected a cell to end, found none that does in 17 lines"):
        read(path)


# -- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_json_line_is_a_row(write, name):
    records = [{"text": "one\ntwo", "label": "x"}, {"label": " y", "text": "three"}]
    path = write(name, "\n".join(map(json.dumps, records)) + "\n\n")
    assert read(path) == ([(1, ("one\ntwo",), "x"), (2, ("three",), "y")], {})


@pytest.mark.parametrize(
    "label, expected",
    [
        (3, "3"),
        (2.5, "2.5"),
        (True, "true"),
        (["b", "a", "b"], ("b", "a")),
        ([1, 2], ("1", "2")),
        ([], ()),
    ],
)
def test_json_labels_may_be_numbers_and_lists(write, label, expected):
    assert rows(write("a.jsonl", json.dumps({"text": "one", "label": label}))) == [(("one",), expected)]


@pytest.mark.parametrize(
    "line, kind, message",
    [
        ('{"text": "a"', "JSON", "expected one JSON object a line"),
        ("[1]", "JSON", r"expected a JSON object, found \[1\]"),
        ('{"txt": "a", "label": 1}', "missing column", r"no column 'text'; did you mean 'txt'\? its columns are"),
        ('{"text": 3, "label": 1}', "not text", "expected text in column 'text', found 3"),
        ('{"text": ["a", 1], "label": 1}', "not text", r"found \['a', 1\]"),
        ('{"text": null, "label": 1}', "empty text", "expected text in column 'text', found none"),
        ('{"text": "\\ud800", "label": 1}', "encoding", "found half a surrogate pair"),
        ('{"text": "\\u0000", "label": 1}', "NUL byte", "found a NUL character"),
        ('{"text": "a", "label": null}', "label", "expected a label in column 'label', found None"),
        ('{"text": "a", "label": NaN}', "label", "found nan"),
        ('{"text": "a", "label": Infinity}', "label", "found inf"),
        ('{"text": "a", "label": [1, {}]}', "label", r"found \[1, {}\]"),
        ('{"text": "a", "label": {"b": 1}}', "label", "found {'b': 1}"),
        (b'{"text": "\xff", "label": 1}', "encoding", "byte 11: expected UTF-8, found 0xff"),
        ("[" * 100_000, "JSON", "expected one JSON object a line"),
    ],
)
def test_bad_json_lines_are_named_by_line_or_left_out(write, line, kind, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write("a.jsonl", b'{"text": "one", "label": 1}\n' + line + b'\n{"text": "three", "label": 1}\n')
    with pytest.raises(UserError, match=rf"1 bad row \(1 {kind}\): .*a.jsonl, line 2: .*{message}"):
        read(path)
    found, counts = read(path, skip=True)
    assert [texts for _, texts, _ in found] == [("one",), ("three",)] and counts == {kind: 1}


@pytest.mark.parametrize("data", ['[{"text": "a"}]', '{\n  "text": "a"\n}', "text,label\na,b\n"])
def test_a_file_that_is_no_json_lines_is_refused_at_once(write, data):
    with pytest.raises(UserError, match="a.json, line 1: expected one JSON object a line, found "):
        read(write("a.json", data), skip=True)


@pytest.mark.parametrize("line", ["the film", "[1]", "null", b"\xff"])
def test_a_bad_first_json_line_is_a_bad_row(write, line):
    line = line if isinstance(line, bytes) else line.encode()
    path = write("a.jsonl", line + b'\n{"text": "two", "label": 1}\n')
    assert [row[:2] for row in read(path, skip=True)[0]] == [(2, ("two",))]
    with pytest.raises(UserError, match="1 bad row .*a.jsonl, line 1: .*expected"):
        read(path)


def test_a_long_json_line_is_a_bad_row(write, monkeypatch):
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 40)
    path = write("a.jsonl", json.dumps({"text": "x" * 50}) + '\n{"text": "two", "label": 1}\n')
    assert read(path, skip=True) == ([(2, ("two",), "1")], {"long line": 1})


def test_many_lines_without_a_json_object_are_refused_before_the_rest_is_read(write):
    path = write("a.jsonl", "text,label\n" * 200 + '{"text": "two", "label": 1}\n')
    with pytest.raises(UserError, match="a.jsonl, line 1: expected one JSON object a line, found 'text,label'"):
        read(path, skip=True)


def test_a_text_file_holds_one_text_a_line(write):
    path = write("a.txt", 'say "so", then\tend\r\n\nlast')
    found = list(iter_table(path, ("sentence",)))
    assert [row.texts[0] for row in (found[0], found[2])] == ['say "so", then\tend', "last"]
    assert found[1].kind == "empty text" and found[2].where == f"{path}, line 3"
    for text, label in ((("a", "b"), ""), (("a",), "label")):
        with pytest.raises(UserError, match="a .txt file holds one text a line"):
            list(iter_table(path, text, label))


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_that_lead_to_no_table_are_refused(write, tmp_path):
    with pytest.raises(UserError, match="nothing.csv: no such file"):
        read(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="a.xlsx: expected a name that ends in .csv, .tsv, .jsonl"):
        read(write("a.xlsx", "x"))
    with pytest.raises(UserError, match="expected the name of at least one text column"):
        read(write("a.csv", "text\n"), (), "")


def test_a_truncated_file_is_refused_after_its_rows(tmp_path):
    path = tmp_path / "a.csv.gz"
    data = b"text,label\n" + b"".join(b"row %d,x\n" % (n * n) for n in range(20_000))
    path.write_bytes(gzip.compress(data)[:-50])
    with pytest.raises(UserError, match="a.csv.gz: truncated or broken compressed data"):
        read(path, skip=True)


# -- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    def parquet(**columns):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    return parquet


def test_parquet_rows_are_numbered_from_one(parquet):
    path = parquet(text=["one", "two"], label=[1, 0], other=[[1], [2]])
    assert read(path) == ([(1, ("one",), "1"), (2, ("two",), "0")], {})
    assert next(iter_table(path, ("text",))).where == f"{path}, row 1"


def test_parquet_lists_are_multi_label(parquet):
    assert rows(parquet(text=["one", "two"], label=[["b", "a"], []])) == [(("one",), ("b", "a")), (("two",), ())]


def test_parquet_decimals_are_numbers(parquet):
    assert rows(parquet(text=["one"], label=[decimal.Decimal("1.50")])) == [(("one",), "1.50")]


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([["one"], ["x"], ["two"]], names=["text", "label", "text"])
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    with pytest.raises(UserError, match="a.parquet: expected one column 'text', found 2"):
        read(path)


def test_bad_parquet_rows_are_named_by_row(parquet):
    path = parquet(text=["one", None, "three", ""], label=[1.5, 2, None, 3])
    with pytest.raises(UserError, match=r"3 bad rows \(2 empty text, 1 label\): .*row 2: .*row 3: .*row 4: "):
        read(path)
    assert read(path, skip=True)[0] == [(1, ("one",), "1.5")]


def test_parquet_files_that_make_no_sense_are_refused(parquet, write, tmp_path):
    with pytest.raises(UserError, match=r"a.parquet: no column 'label'; did you mean 'labels'\? its columns are"):
        read(parquet(text=["a"], labels=["b"]))
    with pytest.raises(UserError, match="a.parquet, after row 0: expected a Parquet file"):
        read(write("a.parquet", "text,label\n"))
    with pytest.raises(UserError, match="nothing.parquet: no such file"):
        read(tmp_path / "nothing.parquet")


def test_without_pyarrow_the_error_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(write("a.parquet", "x"))


# -- TFDS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Labelled(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            names = tfds.features.ClassLabel(names=["neg", "pos"])
            features = {
                "text": tfds.features.Text(),
                "label": names,
                "labels": tfds.features.Sequence(names),
                "stars": np.int32,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples([("zwö", 1, [0, 1]), ("one", 0, [])]),
                    "test": self._generate_examples([("three", -1, [])])}  # fmt: skip

        def _generate_examples(self, rows):
            for text, label, labels in rows:
                yield text, {"text": text, "label": label, "labels": labels, "stars": 4}

    directory = tmp_path_factory.mktemp("tfds")
    Labelled(data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


def test_tfds_class_labels_are_read_by_name(tfds_dir):
    assert sorted(rows("tfds:labelled", tfds_dir=tfds_dir)) == [(("one",), "neg"), (("zwö",), "pos")]
    assert sorted(rows("tfds:labelled", label="labels", tfds_dir=tfds_dir)) == [
        (("one",), ()),
        (("zwö",), ("neg", "pos")),
    ]
    assert rows("tfds:labelled/test", label="stars", tfds_dir=tfds_dir) == [(("three",), "4")]
    assert next(iter_table("tfds:labelled", ("text",), tfds_dir=tfds_dir)).where == "tfds:labelled, example 0"


def test_tfds_examples_without_a_label_are_bad_rows_where_one_is_asked_for(tfds_dir):
    assert rows("tfds:labelled/test", label="", tfds_dir=tfds_dir) == [(("three",), None)]
    with pytest.raises(
        UserError, match=r"tfds:labelled/test, example 0: expected a label in column 'label', found None"
    ):
        read("tfds:labelled/test", tfds_dir=tfds_dir)


def test_tfds_errors_name_the_dataset_and_what_is_there(tfds_dir):
    with pytest.raises(UserError, match="tfds:other: expected a prepared dataset"):
        read("tfds:other", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match="expected one of the splits train, test"):
        read("tfds:labelled/valid", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match=r"tfds:labelled: no column 'txt'; did you mean 'text'\?"):
        read("tfds:labelled", ("txt",), tfds_dir=tfds_dir)


def test_the_features_of_a_dataset_name_no_code_to_import(tfds_dir, tmp_path):
    path = shutil.copytree(tfds_dir, tmp_path / "copy") / "labelled" / "1.0.0" / "features.json"
    whole = path.read_text()
    assert "tensorflow_datasets.core" in whole
    for old, new in {"tensorflow_datasets.": "os.", '"pythonClassName"': '"type": "evil.Feature", "a"'}.items():
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(UserError, match="features.json: expected a feature of tensorflow_datasets, found '"):
            next(iter_table("tfds:labelled", ("text",), tfds_dir=str(tmp_path / "copy")))


def test_a_value_nested_deeply_is_a_bad_row(write):
    path = write("a.jsonl", '{"text": "a", "label": ' + "[" * 500 + "]" * 500 + "}\n")
    [row] = iter_table(path, ("text",), "label")
    assert (row.kind, row.message) == ("JSON", "expected one JSON object a line (nested deeper than 64)")


def test_of_many_columns_the_first_are_named(write):
    path = write("a.csv", ",".join(f"c{i}" for i in range(1000)) + "\n")
    with pytest.raises(UserError, match=r"'c18', 'c19', … \(1000 in all\)$"):
        read(path)


# -- words with tags, and questions with answers ----------------------------------------------------------------------


def lines_of(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_words_come_with_a_tag_each_as_lists_or_with_spaces_between_them(write):
    bad = BadRows("error")
    lists = write(
        "a.jsonl", lines_of({"tokens": ["Ann", "left"], "ner": ["B-PER", "O"]}, {"tokens": ["hi"], "ner": [0]})
    )
    found = read_tagged(lists, "tokens", "ner", bad)
    assert [(row.words, row.tags) for row in found] == [(("Ann", "left"), ("B-PER", "O")), (("hi",), ("0",))]
    (row,) = read_tagged(write("a.csv", "tokens,ner\nAnn  left,B-PER O\n"), "tokens", "ner", bad)
    assert (row.words, row.tags) == (("Ann", "left"), ("B-PER", "O"))
    assert bad.counts == {}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": ["Ann", "left"], "ner": ["O"]}, "line 1: expected 2 tags in column 'ner', one a word, found 1"),
        ({"tokens": ["Ann"], "ner": [None]}, "expected 1 tags in column 'ner', one a word, found something else"),
        ({"tokens": [], "ner": []}, "expected words in column 'tokens', found none"),
        ({"tokens": ["Ann", ""], "ner": ["O", "O"]}, "column 'tokens'"),
        ({"tokens": ["Ann"], "tags": ["O"]}, "no column 'ner'"),
    ],
)
def test_words_without_a_tag_each_are_a_bad_row(write, record, message):
    bad, path = BadRows("error"), write("a.jsonl", lines_of(record))
    assert read_tagged(path, "tokens", "ner", bad) == []
    with pytest.raises(UserError, match=message):
        bad.close(path)


CONTEXT = "Ann met Ann in Rome."


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        ("Ann", (Answer("Ann", 0),)),
        ([" Rome", "in Rome"], (Answer("Rome", 15), Answer("in Rome", 12))),
        ({"text": "Ann", "answer_start": 8}, (Answer("Ann", 8),)),
        ({"text": ["Ann", "Rome"], "answer_start": [8, 15]}, (Answer("Ann", 8), Answer("Rome", 15))),
        ([{"text": "Ann", "answer_start": 8}], (Answer("Ann", 8),)),
        *((nothing, ()) for nothing in (None, "", " ", [], {"text": [], "answer_start": []})),
    ],
)
def test_an_answer_is_a_text_of_the_context_or_comes_with_its_place(write, written, answers):
    path = write("a.jsonl", lines_of({"q": "Who?", "c": CONTEXT, "a": written}))
    (row,) = read_questions(path, ("q", "c"), "a", BadRows("error"))
    assert (row.id, row.question, row.context, row.answers) == ("1", "Who?", CONTEXT, answers)
    assert row.impossible == (not answers)


def test_answers_of_a_csv_are_texts_of_the_context(write):
    path = write("a.csv", f"q,c,a\nWhere?,{CONTEXT},Rome\nWhy?,{CONTEXT},\n")
    found = read_questions(path, ("q", "c"), "a", BadRows("error"))
    assert [(row.id, row.answers) for row in found] == [("1", (Answer("Rome", 15),)), ("2", ())]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("Paris", "expected an answer that stands in its context, found 'Paris'"),
        ({"text": "Rome", "answer_start": 3}, "expected the answer 'Rome' at character 3, found ' met'"),
        ({"text": ["Rome", "Ann"], "answer_start": [15]}, "expected an answer with 'text' and 'answer_start'"),
        (7, "expected an answer with 'text' and 'answer_start', found 7"),
    ],
)
def test_an_answer_that_is_not_where_it_should_be_is_a_bad_row(write, written, message):
    bad, path = BadRows("error"), write("a.jsonl", lines_of({"q": "Who?", "c": CONTEXT, "a": written}))
    assert read_questions(path, ("q", "c"), "a", bad) == []
    with pytest.raises(UserError, match=message):
        bad.close(path)
