import gzip
import lzma

import pytest

from electrax.config import UserError
from electrax.data import examples
from electrax.data.examples import (
    BadRow,
    BadRows,
    TextExample,
    check_labels,
    check_numbers,
    collect,
    find_classes,
    read_json,
    read_lines,
    short,
    text_fault,
)


def labelled(*labels):
    return [TextExample(f"row {n}", ("text",), label) for n, label in enumerate(labels, 1)]


def test_all_bad_rows_are_reported_in_one_error_of_one_line():
    bad = BadRows("error")
    for n in range(6):
        bad.add(f"a.csv, line {n}", "empty text", "expected text")
    bad.add("a.csv, line 9", "label", "expected a label")
    assert bad.counts == {"empty text": 6, "label": 1}
    with pytest.raises(UserError) as error:
        bad.close("a.csv")
    assert str(error.value) == (
        "a.csv: 7 bad rows (6 empty text, 1 label): a.csv, line 0: expected text; a.csv, line 1: expected text; "
        "a.csv, line 2: expected text; a.csv, line 3: expected text; a.csv, line 4: expected text; and 2 more; "
        'data.on_bad_row = "skip" leaves them out'
    )


def test_a_single_bad_row_is_reported_without_a_plural():
    bad = BadRows()
    bad.add("a.csv, line 2", "label", "expected a label")
    with pytest.raises(UserError, match=r"^a.csv: 1 bad row \(1 label\): a.csv, line 2: expected a label; data"):
        bad.close("a.csv")


def test_bad_rows_are_counted_and_left_out_when_they_are_to_be_skipped():
    bad = BadRows("skip")
    (good,) = labelled("x")
    assert collect([BadRow("line 1", "label", "none"), good], bad, "a.csv") == [good]
    assert bad.counts == {"label": 1}
    bad.close("a.csv")
    BadRows("error").close("a.csv")


def test_collecting_stops_at_the_limit():
    rows = iter([*labelled("a", "b"), BadRow("line 3", "label", "none")])
    bad = BadRows()
    assert [e.label for e in collect(rows, bad, "a.csv", limit=2)] == ["a", "b"]
    assert not bad.counts and len(list(rows)) == 1


def test_a_file_without_a_usable_row_is_refused():
    with pytest.raises(UserError, match="a.csv: expected rows, found none"):
        collect([], BadRows("error"), "a.csv")
    with pytest.raises(UserError, match="a.csv: expected rows, found none"):
        collect([BadRow("line 1", "label", "none")], BadRows("skip"), "a.csv")
    bad = BadRows("error")  # here `close` says why
    assert collect([BadRow("line 1", "label", "none")], bad, "a.csv") == [] and bad.counts


@pytest.mark.parametrize(
    "labels, classes",
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1", "9"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["10", "9", "nan"], ("10", "9", "nan")),
        ([("b", "a"), (), ("c",)], ("a", "b", "c")),
        ([None, "a"], ("a",)),
    ],
)
def test_classes_are_the_labels_in_numeric_or_alphabetical_order(labels, classes):
    assert find_classes(labelled(*labels)) == classes


@pytest.mark.parametrize("labels", [["1", "0", "1.0"], ["1", "x", ("y", "1.0")]])
def test_a_number_written_in_two_ways_is_not_two_classes(labels):
    message = r"^row 3: expected the label '1' as in row 1, found '1.0' \(one number\)$"
    with pytest.raises(UserError, match=message):
        find_classes(labelled(*labels))


def test_labels_outside_the_classes_are_bad_rows():
    bad = BadRows()
    rows = labelled("yes", "maybe", None, ("no", "yes"), ("no", "what"), ())
    assert [e.label for e in check_labels(rows, ("no", "yes"), bad)] == ["yes", ("no", "yes"), ()]
    with pytest.raises(UserError, match=r"3 bad rows \(3 label\): row 2: expected one of the labels 'no', 'yes', found "
                       r"'maybe'; row 3: .*, found none; row 5: .*, found 'what'; data"):  # fmt: skip
        bad.close("a.csv")


def test_a_long_list_of_classes_is_shortened():
    bad = BadRows()
    check_labels(labelled("x"), [str(n) for n in range(500)], bad)
    with pytest.raises(UserError, match=r"labels '0', .*'9', … \(500 in all\), found 'x'"):
        bad.close("a.csv")


def test_labels_of_a_regression_are_finite_numbers():
    bad = BadRows("skip")
    rows = labelled("1", "-2.5e1", "x", "nan", "inf", None, ("1",), "1_0")
    assert [e.label for e in check_numbers(rows, bad)] == ["1", "-2.5e1"]
    assert bad.counts == {"label": 6}


def test_values_are_shortened_to_one_line():
    assert short("a\nb") == r"'a\nb'"
    assert short("x" * 1000, 10) == "'xxxxxxxxx…"
    assert "\n" not in short({"a": "b\nc"})


@pytest.mark.parametrize(
    "value, kind",
    [
        ("text", None),
        ("", "empty text"),
        (" \t\u00a0\n", "empty text"),
        (None, "empty text"),
        (3, "not text"),
        (["a"], "not text"),
        ("a\0b", "NUL byte"),
        ("\ud800", "encoding"),
    ],
)
def test_what_cannot_be_a_text_is_found(value, kind):
    fault = text_fault(value, "column 'a'")
    assert (fault and fault.kind) == kind
    assert fault is None or fault.message.startswith("expected text in column 'a', found ")


# -- files ------------------------------------------------------------------------------------------------------------


def test_lines_keep_their_ends_and_only_a_newline_is_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028\x0c\x85three\rx\n\nlast".encode())
    lines = list(read_lines(path))
    assert [line.text for line in lines] == ["one\r\n", "two\u2028\x0c\x85three\rx\n", "\n", "last"]
    assert [line.number for line in lines] == [1, 2, 3, 4] and not any(line.fault for line in lines)


def test_faults_of_a_line_name_the_byte_and_the_next_line_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\xffc\nd\0\ne\n")
    lines = list(read_lines(path))
    assert [line.fault and line.fault.kind for line in lines] == [None, "encoding", "NUL byte", None]
    assert lines[1].fault.message.startswith("byte 2: expected UTF-8, found 0xff")


def test_an_over_long_line_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789\n" + b"x" * 50 + b"\nend\n")
    lines = list(read_lines(path))
    assert [line.fault and line.fault.kind for line in lines] == [None, "long line", None]
    assert [line.number for line in lines] == [1, 2, 3] and lines[2].text == "end\n"


@pytest.mark.parametrize("suffix, compress", [("gz", gzip.compress), ("xz", lzma.compress)])
def test_compressed_files_are_read_and_broken_ones_refused(tmp_path, suffix, compress):
    path = tmp_path / f"a.json.{suffix}"
    path.write_bytes(compress(b'{"a": 1}\n'))
    assert [line.text for line in read_lines(path)] == ['{"a": 1}\n'] and read_json(path) == {"a": 1}
    for broken in (compress(b'{"a": 1}\n' * 999)[:-9], b"no" * 20):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"a.json.{suffix}: .*(truncated or broken|cannot be read)"):
            list(read_lines(path))


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothing.txt: no such file"):
        list(read_lines(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_lines(tmp_path))


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"{")
    with pytest.raises(UserError, match="a.json: expected JSON"):
        read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(UserError, match="a.json, byte 2: expected UTF-8"):
        read_json(path)
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path) == [1]
