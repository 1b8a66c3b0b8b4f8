"""TensorFlow's files, whole and damaged. tests/fixtures/make_tensorflow.py wrote those of tests/fixtures/tensorflow."""

import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from electrax.config import UserError
from electrax.convert import bundle
from electrax.convert.tensorflow import read_checkpoint, towers
from tests.convert.bundles import bit_by_bit, block, entry, field, finish, handles_of, index_of, masked, table, write
from tests.fixtures.make_tensorflow import electra, value

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "tensorflow"
SHAPES = dict(electra(untied=True))


def test_names_that_share_their_beginnings_in_several_blocks_come_back_whole_with_types_of_their_own(tmp_path):
    arrays = {
        "a": np.array(-(2**40), np.int64),
        "a/bb": np.array([[1.5], [2.5]], np.float16),
        "a/bc": np.zeros((0, 3), np.float32),
        "b": np.array([7, -7], np.int32),
        "ba": np.array([1 / 3], np.float64),
    }
    write(tmp_path / "model", arrays, blocks=3)
    found = read_checkpoint(tmp_path / "model").variables
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_checksums_are_those_of_rfc_3720_however_many_lanes_there_are(monkeypatch):
    assert bundle.crc32c(b"") == 0
    assert bundle.crc32c(b"123456789") == 0xE3069283
    assert bundle.crc32c(bytes(32)) == 0x8A9136AA
    assert bundle.crc32c(b"\xff" * 32) == 0x62A8AB43
    data = np.random.RandomState(0).bytes(3000)
    for size in (1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 1000, 3000):
        assert bundle.crc32c(data[:size]) == bit_by_bit(data[:size]), size
    monkeypatch.setattr(bundle, "LANES", 4)  # the chunks of a large array
    for size in (255, 256, 257, 259, 513, 3000):
        assert bundle.crc32c(data[:size]) == bit_by_bit(data[:size]), size


# -- bad input ---------------------------------------------------------------------------------------------------------


def copy(name: str, folder: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(FIXTURES / name, folder / "copy")


def assert_refused(path: pathlib.Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_damaged_index_is_one_line(tmp_path):
    index = copy("electra", tmp_path) / "model.ckpt-7.index"
    good = index.read_bytes()

    def expect(content: bytes, message: str) -> None:
        index.write_bytes(content)
        assert_refused(index.parent, f"{index.name}: {message}")

    for content in (b"", good[:-1], good[: len(good) // 2], good[:-8] + b"LevelDB!", b"\0" * 100):
        expect(content, "not the index of a TensorFlow checkpoint, or cut off")
    expect(good[100:], "damaged: a block lies beyond the end")
    for place in (10, len(good) // 2, *range(len(good) - 110, len(good) - 48)):
        flipped = bytearray(good)
        flipped[place] ^= 4
        expect(bytes(flipped), "damaged: the checksum of a block is not that of its bytes")
    index.unlink()
    index.mkdir()
    assert_refused(index.with_suffix(""), "index: cannot be read")


def test_an_index_that_asks_for_what_is_not_read_is_one_line(tmp_path):
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(12))

    def expect(content: bytes, message: str) -> None:
        (tmp_path / "m.index").write_bytes(content)
        assert_refused(tmp_path / "m", message)

    (tmp_path / "m.index").write_bytes(index_of(a=entry()))
    assert read_checkpoint(tmp_path / "m").variables["a"].tolist() == [0, 0]
    expect(table(block({b"": field(1, 1)}, kind=1)), "its blocks are compressed")
    expect(index_of(a=entry(dtype=7)), "a is of TensorFlow's type 7; expected one of 1, 2, 3, 9, 19")
    expect(index_of(a=entry(dtype=200)), "a is of TensorFlow's type 200")
    expect(index_of(a=entry(shape=(3,))), "the shape of a does not fit its 8 bytes")
    expect(index_of(a=entry(shape=(2**63, 0), size=0)), "the shape of a does not fit its 0 bytes")
    expect(index_of(a=entry(shape=(2, *[1] * 40))), "the shape of a does not fit")
    expect(index_of(a=entry(shard=1)), "a lies in the file 1 of 1")
    expect(index_of(a=entry(), b=entry(offset=4)), "b begins within another variable")
    expect(index_of(a=entry(shape=(2**37,), size=2**39)), "a ends at 549755813888 bytes, the file at 12")
    expect(index_of(a=entry(more=field(7, b""))), "a is partitioned, which electrax does not read")
    expect(index_of(_CHECKPOINTABLE_OBJECT_GRAPH=entry(dtype=7)), "a checkpoint of TensorFlow 2's objects")
    expect(table(block({b"": field(1, 1) + field(2, 1)})), "written by a big-endian machine")
    expect(table(block({b"a": entry()})), "says that there are 0 files of data")
    expect(table(block({b"": field(1, 1), b"b": entry(), b"a": entry()})), "its names are in no order")
    expect(index_of(a=entry()[:-1]), "damaged: a field is cut off")
    expect(index_of(a=b"\x80"), "damaged: a number is cut off")
    empty = block({})
    expect(finish(empty, *handles_of(empty) * 3), "damaged: its blocks overlap")
    assert_refused(FIXTURES / "partitioned", "electra/embeddings_project/bias is partitioned")


def test_damaged_data_is_one_line(tmp_path):
    folder = copy("untied", tmp_path)
    data = folder / "model.ckpt-7.data-00002-of-00003"
    good = data.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        flipped = bytearray(good)
        flipped[place] ^= 1
        data.write_bytes(bytes(flipped))
        assert_refused(folder, f"{data.name}: damaged: the checksum of [a-z_/0-9A-Z]+ is not that of its bytes")
    data.write_bytes(good[:-1])
    assert_refused(folder, rf"{data.name}: cut off: \S+ ends at {len(good)} bytes, the file at {len(good) - 1}")
    data.unlink()
    assert_refused(folder, f"{data.name}: cannot be read [(]No such file or directory[)]")
    (folder / "model.ckpt-7.data-00000-of-00003").unlink()  # holds the number of steps alone
    data.write_bytes(good)
    assert read_checkpoint(folder).variables.keys() == SHAPES.keys()


def damage(good: bytes, at: float, byte: int, kind: str) -> bytes:
    place = int(at * (len(good) - 1))
    match kind:
        case "flip":
            return good[:place] + bytes([good[place] ^ byte]) + good[place + 1 :]
        case "cut":
            return good[:place]
        case "drop":
            return good[:place] + good[place + byte :]
        case _:
            return good[:place] + good[place : place + byte] + good[place:]


DAMAGE = (
    st.floats(0, 1),
    st.integers(1, 255),
    st.sampled_from(["flip", "flip", "cut", "drop", "double"]),
)


@hypothesis.given(st.sampled_from(["model.ckpt-7.index", "model.ckpt-7.data-00002-of-00003"]), *DAMAGE)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_of_damaged_files_come_the_right_arrays_or_one_line(tmp_path_factory, file, at, byte, kind):
    folder = copy("untied", tmp_path_factory.mktemp("fuzz"))
    (folder / file).write_bytes(damage((FIXTURES / "untied" / file).read_bytes(), at, byte, kind))
    try:
        found = read_checkpoint(folder).variables
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert found.keys() == SHAPES.keys()
    assert all(np.array_equal(found[name], value(name, shape)) for name, shape in SHAPES.items())


@hypothesis.given(*DAMAGE)
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_of_a_wrong_index_whose_checksum_is_right_comes_a_model_or_one_line(tmp_path_factory, at, byte, kind):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "m.data-00000-of-00001").write_bytes(bytes(16))
    names = (b"electra/embeddings_project/bias", b"electra/embeddings_project/kernel")
    records = {name: entry(shape=(1, 2), offset=8 * i) for i, name in enumerate(names)}
    content = damage(block({b"": field(1, 1), **records})[:-5], at, byte, kind) + b"\0"
    (folder / "m.index").write_bytes(table(content + masked(content)))
    try:
        towers(read_checkpoint(folder / "m"))
    except UserError as error:
        assert "\n" not in str(error)
