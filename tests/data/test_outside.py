import tracemalloc

import pytest

from electrax.config import UserError
from electrax.data import compressed as compressed_files
from electrax.data import examples
from electrax.data.examples import BadRows, read_json
from electrax.data.outside import is_file_name, parse_json, read_bytes, read_object
from electrax.data.readers import LineReader, find_sources
from electrax.data.tables import read_table
from tests.data.test_fuzz import compressed


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "Expecting property name"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("1" * 5000, "4300 digits"),
        (b"\xff", "invalid start byte"),
    ],
)
def test_json_that_is_broken_or_too_deep_or_has_too_large_numbers_is_a_value_error(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_json_as_deep_as_is_allowed_is_read():
    value = parse_json("[" * 64 + "]" * 64)
    for _ in range(63):
        [value] = value
    assert value == []
    assert parse_json(b'\xef\xbb\xbf{"a": "' + b"[" * 200 + b'"}') == {"a": "[" * 200}


def test_a_file_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="a: expected at most 4 bytes"):
        read_bytes(tmp_path / "a", 4)
    with pytest.raises(UserError, match="cannot be read"):
        read_bytes(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": "1"}', '{"a": true}', "x"])
def test_an_object_without_its_keys_or_types_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json: (not JSON|not an object of JSON|'a' is missing or of a wrong type)"):
        read_object(tmp_path / "a.json", a=int)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "a\0", None, 1])
def test_what_may_lead_out_of_a_folder_is_no_name_of_a_file(name):
    assert not is_file_name(name) and is_file_name("model.safetensors") and is_file_name("..a")


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def peak():
    """Reads what may not be kept; tells the most memory that was in use, in MiB."""

    def peak(read) -> float:
        tracemalloc.start()
        try:
            with pytest.raises(UserError) as error:
                read()
            assert len(str(error.value)) < 400
            return tracemalloc.get_traced_memory()[1] / 2**20
        finally:
            tracemalloc.stop()

    return peak


def read_examples(path, skip=False):
    bad = BadRows("skip" if skip else "error")
    read_table(path, ("0",), "1", bad)
    bad.close(path)


def test_a_line_of_200_mb_is_refused_in_the_memory_of_the_longest_one(tmp_path, peak):
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        file.truncate(200 << 20)  # takes no room on the disk
    source = find_sources((str(path),), max_line_bytes=1 << 20)
    assert peak(lambda: list(LineReader(source).read())) < 8
    path.rename(tmp_path / "a.csv")
    assert peak(lambda: read_examples(tmp_path / "a.csv")) < 80
    assert peak(lambda: read_examples(tmp_path / "a.csv", skip=True)) < 80


@pytest.mark.parametrize("kind", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("line", [b"x", b"one,a\n", b"\n"], ids=["one line", "rows", "blank lines"])
def test_a_compressed_bomb_is_refused_before_it_unfolds(tmp_path, monkeypatch, peak, kind, line):
    monkeypatch.setattr(compressed_files, "MOST_ALWAYS", 1 << 16)
    monkeypatch.setattr(compressed_files, "MOST_TIMES", 10)
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 1 << 16)
    data = compressed(kind, line * ((4 << 20) // len(line)))
    assert len(data) < 1 << 16
    for name in ("a.csv", "a.txt"):
        (tmp_path / f"{name}{kind}").write_bytes(data)
    assert peak(lambda: read_examples(tmp_path / f"a.csv{kind}", skip=True)) < 64
    source = find_sources((str(tmp_path / f"a.txt{kind}"),), max_line_bytes=1 << 16)
    assert peak(lambda: list(LineReader(source).read())) < 64


def test_a_json_file_is_read_up_to_a_limit(tmp_path, monkeypatch, peak):
    monkeypatch.setattr(examples, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "a.json.gz").write_bytes(compressed(".gz", b'{"data": [' + b" " * (32 << 20) + b"]}"))
    assert peak(lambda: read_json(tmp_path / "a.json.gz")) < 8


def test_a_row_of_csv_ends_within_a_limit_however_many_cells_go_over_lines(tmp_path, monkeypatch, peak):
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr("electrax.data.records.MAX_LINE_BYTES", 1 << 16)
    (tmp_path / "a.csv").write_bytes(b'"a\n' + b'b","c\n' * (1 << 20))
    assert peak(lambda: read_examples(tmp_path / "a.csv")) < 16
