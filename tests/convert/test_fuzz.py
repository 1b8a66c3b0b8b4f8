"""Every reader of models from outside gives what it read, or refuses it in one line that names the file."""

import flax.serialization
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from electrax.convert.bundle import read_bundle
from electrax.convert.msgpack import read_msgpack
from electrax.convert.safetensors import read_safetensors, write_safetensors
from electrax.convert.weights import read_tree, read_weights, write_tree
from tests.convert.bundles import block, entry, masked, table
from tests.fuzzing import as_json, changed, damaged, read_or_refuse, settings

A = np.arange(6, dtype=np.float32).reshape(2, 3)
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
}
CHUNKED = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": {"0": A[0], "1": A[1]}}
MSGPACK = flax.serialization.msgpack_serialize({"x": {"kernel": A, "bias": A[0]}, "y": CHUNKED})
INDEX = {"metadata": {"total_size": 24}, "weight_map": {"a": "1.safetensors"}}
NUMBERS = st.sampled_from((0, 1, 2, 8, 24, 2**31, 2**40, 2**63, 2**69))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + A.tobytes() + bytes(4)


def read_all(arrays: dict[str, np.ndarray]) -> None:
    assert all(array.sum() is not None for array in arrays.values())


@hypothesis.given(
    changed(HEADER).map(lambda header: with_header(as_json(header))) | damaged(with_header(as_json(HEADER)))
)
@settings
def test_safetensors(folder, data):
    path = folder / "a.safetensors"
    path.write_bytes(data)
    read_or_refuse(lambda: read_all(read_safetensors(path)), path)


@hypothesis.given(st.data())
@settings
def test_trees_with_a_checksum(folder, data):
    path = folder / "tree.safetensors"
    write_tree(path, {"x": {"a": A}, "y": A[0]})
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read_or_refuse(lambda: read_tree(path), path)


@hypothesis.given(damaged(MSGPACK))
@settings
def test_msgpack(folder, data):
    path = folder / "a.msgpack"
    path.write_bytes(data)
    read_or_refuse(lambda: read_all(read_msgpack(path)), path)


@hypothesis.given(changed(INDEX).map(as_json) | damaged(as_json(INDEX)))
@settings
def test_indexes_of_shards(folder, data):
    write_safetensors(folder / "1.safetensors", {"a": A})
    (folder / "model.safetensors.index.json").write_bytes(data)
    read_or_refuse(lambda: read_weights(folder), folder)


@st.composite
def entries(draw) -> bytes:
    """A variable whose numbers are anything, with a checksum that fits."""
    fields = {name: draw(NUMBERS) for name in draw(st.sets(st.sampled_from(("dtype", "shard", "offset", "size"))))}
    shape = draw(st.lists(NUMBERS, max_size=3)) if draw(st.booleans()) else (2,)
    return draw(st.just(entry(shape=tuple(shape), **fields)) | damaged(entry()))


@hypothesis.given(st.data())
@settings
def test_bundles(folder, data):
    header = b"\x08\x01\x1a\x02\x08\x01"
    good = {b"": header, b"a": entry(), b"ab": entry(offset=8)}
    records = data.draw(
        st.just(good) | st.fixed_dictionaries({b"": st.just(header), b"a": entries(), b"ab": entries()})
    )
    path = folder / "model.index"
    index = data.draw(st.sampled_from((table(block(records)), _with_damaged_block(data, records))))
    path.write_bytes(data.draw(st.just(index) | damaged(index)))
    (folder / "model.data-00000-of-00001").write_bytes(bytes(16))
    read_or_refuse(lambda: read_all(read_bundle(path, lambda name: None)[0]), folder)


def _with_damaged_block(data: st.DataObject, records: dict[bytes, bytes]) -> bytes:
    """A table whose checksums fit, but whose first block holds anything."""
    content = data.draw(damaged(block(records)[:-5])) + b"\0"
    return table(content + masked(content))
