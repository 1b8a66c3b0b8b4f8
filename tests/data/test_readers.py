import gzip
import io
import json
import lzma

import pytest

from electrax.config import UserError
from electrax.data.readers import END, LineReader, find_sources


def read(*texts, skip=False, **settings):
    """(documents as lists of lines, what was skipped)."""
    reader = LineReader(find_sources(tuple(map(str, texts)), **settings), "skip" if skip else "error")
    documents, current = [], []
    for _, _, item in reader.read():
        if item is END:
            documents.append(current)
            current = []
        else:
            current.append(item)
    assert current == [], "the last document has an end"
    return documents, dict(reader.skipped)


def compress(suffix, data):
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as tools that append leave them
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](data)


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compress("." + name.rpartition(".")[2] if name[-3:] in (".gz", ".xz", "zst") else "", data))
        return path

    return write


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_documents_end_at_blank_lines_and_at_the_end_of_a_file(write, suffix):
    path = write("a.txt" + suffix, "\ufeffone\r\ntwo\n\n \n\nthrée\u2028x".encode())
    assert read(path) == ([["one", "two"], ["thrée\u2028x"]], {})
    assert read(path, documents="file") == ([["one", "two", "thrée\u2028x"]], {})


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_json_line_is_a_document(write, suffix):
    records = [{"text": "one\n\ntwo"}, {"text": ""}, {"text": "three", "n": 1}]
    path = write("a" + suffix, "\n".join(map(json.dumps, records)).encode() + b"\n\n")
    assert read(path) == ([["one", "two"], ["three"]], {})


def test_another_text_field_can_be_named(write):
    assert read(write("a.jsonl", b'{"body": "one"}\n'), text_field="body")[0] == [["one"]]


def test_folders_and_globs_are_read_in_sorted_order(write, tmp_path):
    for name in ("b.txt", "a/z.txt", "a/.hidden", "c.md"):
        write("in/" + name, name.encode())
    assert read(tmp_path / "in")[0] == [["a/z.txt"], ["b.txt"], ["c.md"]]
    assert read(tmp_path / "in" / "**" / "*.txt")[0] == [["a/z.txt"], ["b.txt"]]


@pytest.mark.parametrize(
    "name, data, kind, message, rest",
    [
        ("a.txt", b"one\n" + b"x" * 2000 + b"\nthree\n", "long_line", r"a.txt, line 2: longer than max_line_mb", True),
        ("a.txt", b"one\nab\xffc\nthree\n", "utf8", r"a.txt, line 2, byte 3: expected UTF-8, found 0xff", True),
        ("a.txt", b"one\n\0\nthree\n", "binary", r"a.txt, line 2: .* NUL byte", False),
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text"\n{"text": "three"}\n',
            "json",
            r"line 2: expected one JSON object",
            True,
        ),
        (
            "a.jsonl",
            b'{"text": "one"}\n[1]\n{"text": "three"}',
            "json",
            r"line 2: expected a JSON object, found li",
            True,
        ),
        ("a.jsonl", b'{"text": "one"}\n{"t": 1}\n{"text": "three"}', "field", r"2: .* found the fields 't'", True),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud800"}\n{"text": "three"}', "utf8", r"line 2: .* surrogate", True),
        ("a.jsonl", b'{"text": "one"}\n{"text": 1}\n{"text": "three"}', "field", r"found a int", True),
    ],
)
def test_bad_lines_are_refused_by_place_or_skipped_and_counted(write, name, data, kind, message, rest):
    path = write(name, data)
    with pytest.raises(UserError, match=message):
        read(path, max_line_bytes=1000)
    documents, skipped = read(path, skip=True, max_line_bytes=1000)
    assert sum(documents, []) == (["one", "three"] if rest else ["one"]) and skipped == {kind: 1}


def test_a_line_of_exactly_the_longest_length_is_read(write):
    path = write("a.txt", b"x" * 1000 + b"\n" + b"y" * 1000)
    assert read(path, max_line_bytes=1000)[0] == [["x" * 1000, "y" * 1000]]
    with pytest.raises(UserError, match="line 2"):
        read(write("b.txt", b"x\n" + b"y" * 1001), max_line_bytes=1000)


def test_an_over_long_line_is_never_held_in_memory(write):
    import tracemalloc

    path = write("a.txt.gz", b"x" * 40_000_000 + b"\nend\n")
    tracemalloc.start()
    assert read(path, skip=True, max_line_bytes=100_000) == ([["end"]], {"long_line": 1})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_and_broken_compression_is_found(tmp_path, suffix):
    data = b"".join(b"line %d\n" % (i * i) for i in range(20_000))
    whole = compress(suffix, data)
    for name, broken in (("cut", whole[:-15]), ("half", whole[: len(whole) // 2]), ("junk", b"no" * 50)):
        path = tmp_path / (name + ".txt" + suffix)
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"{path.name}, after line \d+: truncated or broken"):
            read(path)
        _, skipped = read(path, skip=True)
        assert skipped["compression"] == 1


def test_an_empty_file_is_bad_input(write):
    for data in (b"", b"\n\n"):
        path = write("a.txt", data)
        with pytest.raises(UserError, match="a.txt: expected text, found none"):
            read(path)
        assert read(path, skip=True) == ([], {"empty": 1})


def test_names_that_lead_to_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothing.txt: expected a file, a folder or a glob"):
        find_sources((str(tmp_path / "nothing.txt"),))
    with pytest.raises(UserError, match="expected a folder with files in it"):
        find_sources((str(tmp_path),))


def test_reading_can_go_on_from_any_item_with_the_same_counts(write):
    paths = [write("a.txt", b"\xff\none\n\xff\n\ntwo\n\xff\n"), write("b.txt", b"three\n\xff\n")]
    sources = find_sources(tuple(map(str, paths)))
    whole = LineReader(sources, "skip")
    places = [(source, items, item, dict(whole.skipped)) for source, items, item in whole.read()]
    for k, (source, items, _, skipped) in enumerate(places):
        resumed = LineReader(sources, "skip", skipped)
        assert [p[:3] for p in places[k + 1 :]] == list(resumed.read(source, items))
        assert resumed.skipped == whole.skipped


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples("ab"), "test": self._generate_examples("c")}

        def _generate_examples(self, letters):
            for letter in letters:
                yield letter, {"text": f"{letter} one\n\n{letter} zwö"}

    directory = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


def test_tfds_examples_are_documents(tfds_dir):
    assert sorted(read("tfds:tiny", tfds_dir=tfds_dir)[0]) == [["a one", "a zwö"], ["b one", "b zwö"]]
    assert read("tfds:tiny/test", tfds_dir=tfds_dir)[0] == read("tfds:tiny/1.0.0/test", tfds_dir=tfds_dir)[0]


def test_tfds_errors_name_the_dataset_and_what_is_there(tfds_dir, tmp_path):
    with pytest.raises(UserError, match="tfds:other: expected a prepared dataset"):
        find_sources(("tfds:other",), tfds_dir=tfds_dir)
    with pytest.raises(UserError, match="expected one of the splits train, test"):
        read("tfds:tiny/valid", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match="tfds:tiny, example 0: expected text in field 'body', found the fields 'text'"):
        read("tfds:tiny", tfds_dir=tfds_dir, text_field="body")


def test_tfds_files_of_another_format_are_refused(tfds_dir, tmp_path):
    import shutil

    shutil.copytree(tfds_dir, tmp_path / "copy")
    info = tmp_path / "copy/tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="expected ArrayRecord files"):
        read("tfds:tiny", tfds_dir=str(tmp_path / "copy"))


def test_a_raw_stream_of_zstandard_frames_reads_like_any_file(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as stream:  # no content size in the header
        stream.write(b"one\n" * 100_000)
    path = tmp_path / "a.zst"
    path.write_bytes(buffer.getvalue())
    assert len(read(path)[0][0]) == 100_000


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100 + "]" * 100, "[" * 100_000])
def test_a_json_line_with_what_cannot_be_read_is_bad_input(tmp_path, value):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ' + value + "}\n")
    reader = LineReader(find_sources((str(tmp_path / "a.jsonl"),)), "skip")
    assert [item for _, _, item in reader.read()] == ["good", END] and reader.skipped == {"json": 1}
