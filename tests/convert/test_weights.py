"""Tensors in files, against bytes laid out by hand and the writers of torch and Flax."""

import hashlib
import json
import pickle
import struct
import sys

import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.config import UserError
from electrax.convert.weights import read_tree, read_weights, write_safetensors, write_tree

A = np.array([[1.5, -2, 3], [0, 5, -0.25]], np.float32)
IDS = np.array([[0, 1, 2]], np.int64)
HALVES = [1.0, -2.5, 3.0e-5, 65504.0]


def pack(content, data=b""):
    """A safetensors file by its specification."""
    header = json.dumps(content).encode() if isinstance(content, dict) else content
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WHOLE = pack({"a": entry("F32", [2, 3], 0, 24), "ids": entry("I64", [1, 3], 24, 48)}, A.tobytes() + IDS.tobytes())


def index(folder, weight_map, file="model.safetensors.index.json"):
    (folder / file).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array)


def assert_refused(path, message, read=read_weights):
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# -- safetensors -------------------------------------------------------------------------------------------------------


def test_tensors_of_safetensors_are_read_only_views_of_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    found = read_weights(tmp_path)
    same(found, {"a": A, "ids": IDS})
    for array in found.values():
        assert isinstance(array.base, np.memmap) and not array.flags.writeable


def test_halves_become_float32_of_the_same_values_and_other_types_stay(tmp_path):
    half = np.array(HALVES, np.float16)
    bits = np.array([0x3F80, 0xC020, 0x0001, 0x7F80], np.uint16)  # bfloat16 is the upper half of a float32
    flags = np.array([True, False])
    header = {"h": entry("F16", [4], 0, 8), "b": entry("BF16", [2, 2], 8, 16), "f": entry("BOOL", [2], 16, 18)}
    header |= {"none": entry("F16", [0, 7], 18, 18), "one": entry("F32", [], 18, 22)}
    one = np.array(7, np.float32)
    data = b"".join(array.tobytes() for array in (half, bits, flags, one))
    (tmp_path / "model.safetensors").write_bytes(pack(header, data))
    wide = np.array([1.0, -2.5, 2.0**-133, np.inf], np.float32).reshape(2, 2)
    none = np.zeros((0, 7), np.float32)
    same(read_weights(tmp_path), {"h": half.astype(np.float32), "b": wide, "f": flags, "none": none, "one": one})


def test_an_array_in_any_memory_order_is_written_row_by_row(tmp_path):
    grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensors = {"t": grid.T, "s": grid[:, ::2, 1:3], "f": np.asfortranarray(grid), "i": np.array(-3, np.int8)}
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    same(read_weights(tmp_path), tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"} and size % 8 == 0
    begin, end = header["t"]["data_offsets"]
    assert header["t"]["shape"] == [4, 3, 2] and raw[8 + size :][begin:end] == grid.T.tobytes("C")


def test_the_reference_implementation_reads_what_is_written(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {"a": A.T, "ids": IDS, "flag": np.array([True]), "half": np.array(HALVES, np.float16)}
    write_safetensors(tmp_path / "w", tensors)
    same(safetensors.load_file(tmp_path / "w"), tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": A})
    with pytest.raises(TypeError):
        write_safetensors(path, {"a": A + 1}, {"bad": b"bytes"})
    same(read_weights(tmp_path), {"a": A})


F = "F32"
BROKEN = {
    "empty": (b"", r"not safetensors, or cut short \(a header of 0 bytes in 0\)"),
    "a header cut short": (WHOLE[:40], "not safetensors, or cut short"),
    "a header of 2^63 bytes": (struct.pack("<Q", 2**63) + WHOLE[8:], "a header of 9223372036854775808 bytes"),
    "a flipped bit in the header": (WHOLE[:8] + bytes([WHOLE[8] ^ 1]) + WHOLE[9:], "not JSON"),
    "data cut short": (WHOLE[:-1], "expected 48 bytes after its header, not 47"),
    "data too long": (WHOLE + b"\0", "expected 48 bytes after its header, not 49"),
    "no object": (pack(b"[1]"), "expected an object of JSON"),
    "too deep": (pack(b'{"a":' + b"[" * 100_000), "not JSON"),
    "a name twice": (pack(b'{"a":1,"a":1}'), "'a' is there twice"),
    "no entry": (pack({"a": {"dtype": F}}), "expected a dtype, a shape and two data_offsets of 'a'"),
    "an unknown dtype": (pack({"a": entry("F4", [1], 0, 1)}, b"1"), "'a' has the dtype 'F4'; expected one of F64"),
    "a shape below 0": (pack({"a": entry(F, [-1, -1], 0, 4)}, b"1234"), "the data_offsets of 'a' do not fit"),
    "an endless shape": (pack({"a": entry(F, [0, 2**70], 0, 0)}), "the tensor 'a' cannot be read"),
    "a size that is not its shape's": (pack({"a": entry(F, [2], 0, 4)}, b"1234"), "data_offsets of 'a' do not fit"),
    "two in one place": (pack({"a": entry(F, [1], 0, 4), "b": entry(F, [1], 0, 4)}, b"1234"), "two tensors in one"),
    "a hole": (pack({"a": entry(F, [1], 4, 8)}, b"12345678"), "leaves out bytes of its data"),
    "metadata that is no text": (pack({"__metadata__": {"a": 1}}), "expected texts in the __metadata__"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_refused_in_one_line(name, tmp_path):
    data, message = BROKEN[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    assert_refused(tmp_path, message)


# -- directories -------------------------------------------------------------------------------------------------------


def shards(folder, **files):
    """Files of tensors, and an index of them all."""
    for file, tensors in files.items():
        write_safetensors(folder / f"{file}.safetensors", tensors)
    index(folder, {name: f"{file}.safetensors" for file, tensors in files.items() for name in tensors})


def test_shards_are_one_model(tmp_path):
    shards(tmp_path, x={"a": A}, y={"ids": IDS, "b": A + 1})
    same(read_weights(tmp_path), {"a": A, "ids": IDS, "b": A + 1})


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_a_shard_outside_the_directory_is_refused(file, tmp_path):
    shards(tmp_path, x={"a": A})
    index(tmp_path, {"a": file})
    assert_refused(tmp_path, "names the shard '.*'; expected a file beside it")


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    shards(tmp_path, x={"a": A, "c": A}, y={"a": A, "b": A})
    assert_refused(tmp_path, "'a' is in the shard 'y.safetensors' and in another")
    index(tmp_path, {"a": "x.safetensors", "d": "x.safetensors"})
    assert_refused(tmp_path, "the shard 'x.safetensors' lacks 'd'")
    index(tmp_path, {"a": "z.safetensors"})
    assert_refused(tmp_path, "the shard 'z.safetensors' is missing")
    index(tmp_path, ["x.safetensors"])
    assert_refused(tmp_path, "expected a weight_map of tensors' names to files")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert_refused(tmp_path, "model.safetensors.index.json: not JSON")


def test_safetensors_come_before_msgpack_and_nothing_at_all_is_refused(tmp_path):
    assert_refused(
        tmp_path, "holds no weights; expected one of model.safetensors, pytorch_model.bin, flax_model.msgpack"
    )
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize({"b": A}))
    same(read_weights(tmp_path), {"b": A})
    shards(tmp_path, x={"a": A})
    same(read_weights(tmp_path), {"a": A})
    write_safetensors(tmp_path / "model.safetensors", {"c": A})
    same(read_weights(tmp_path), {"c": A})


def test_old_names_of_norms_are_the_new_ones(tmp_path):
    tensors = {"x.LayerNorm.gamma": A, "x.LayerNorm.beta": IDS, "gamma": A}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    same(read_weights(tmp_path), {"x.LayerNorm.weight": A, "x.LayerNorm.bias": IDS, "gamma": A})
    write_safetensors(tmp_path / "model.safetensors", tensors | {"x.LayerNorm.weight": A})
    assert_refused(tmp_path, "'x.LayerNorm.weight' is there twice")


# -- torch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_of_torch_has_the_same_tensors(legacy, tmp_path):
    torch = pytest.importorskip("torch")
    halves = torch.tensor(HALVES)
    tensors = {"a": torch.tensor(A), "t": torch.tensor(A).T, "ids": torch.tensor(IDS), "p": torch.nn.Parameter(halves)}
    tensors |= {"h": halves.half(), "b": halves.bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    wide = np.array(HALVES, np.float32)
    near = wide.copy()
    near[2:] = halves.bfloat16()[2:].double().numpy()
    expected = {"a": A, "t": A.T, "ids": IDS, "p": wide, "h": wide.astype(np.float16).astype(np.float32), "b": near}
    same(read_weights(tmp_path), expected)


def test_shards_of_torch_are_one_model(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor(A)}, tmp_path / "x.bin")
    torch.save({"ids": torch.tensor(IDS)}, tmp_path / "y.bin")
    index(tmp_path, {"a": "x.bin", "ids": "y.bin"}, "pytorch_model.bin.index.json")
    same(read_weights(tmp_path), {"a": A, "ids": IDS})


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_pickle_that_would_run_code_does_not(is_zip, tmp_path):
    torch = pytest.importorskip("torch")
    evil = {"a": Evil(tmp_path / "ran")}
    if is_zip:
        torch.save(evil, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(evil))
    assert_refused(tmp_path, "pytorch_model.bin: expected a checkpoint of tensors alone")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil["a"])).close()  # the bait is a real one
    assert (tmp_path / "ran").exists()


def test_a_checkpoint_of_other_things_or_cut_short_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    for content in ({"a": 1}, {1: torch.tensor(A)}, [torch.tensor(A)], {"a": torch.tensor(1.0).expand(10**12)}):
        torch.save(content, path)
        assert_refused(tmp_path, "pytorch_model.bin: expected a checkpoint of tensors alone")
    torch.save({"a": torch.tensor(A)}, path)
    path.write_bytes(path.read_bytes()[:-30])
    assert_refused(tmp_path, "pytorch_model.bin: expected a checkpoint of tensors alone")


def test_without_torch_its_checkpoint_is_refused_or_the_one_of_flax_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert_refused(tmp_path, "only PyTorch reads it, which is not installed")
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize({"b": A}))
    same(read_weights(tmp_path), {"b": A})


# -- Flax --------------------------------------------------------------------------------------------------------------


def serialize(tree, folder):
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))


def test_a_tree_of_flax_has_the_names_of_torch_and_its_kernels_transposed(tmp_path):
    query = {"kernel": A, "bias": A[0]}
    norm = {"scale": A[0] + 1, "bias": A[0] + 2}
    layer = {"attention": {"self": {"query": query}, "output": {"LayerNorm": norm}}}
    electra = {"embeddings": {"word_embeddings": {"embedding": A + 3}}, "encoder": {"layer": {"0": layer}}}
    wide = np.arange(300, dtype=np.int64)  # longer lengths than a byte has
    serialize({"electra": electra, "generator_lm_head": {"bias": A[1]}, "ids": wide}, tmp_path)
    found = read_weights(tmp_path)
    expected = {
        "electra.embeddings.word_embeddings.weight": A + 3,
        "electra.encoder.layer.0.attention.self.query.weight": A.T,
        "electra.encoder.layer.0.attention.self.query.bias": A[0],
        "electra.encoder.layer.0.attention.output.LayerNorm.weight": A[0] + 1,
        "electra.encoder.layer.0.attention.output.LayerNorm.bias": A[0] + 2,
        "generator_lm_head.bias": A[1],
        "ids": wide,
    }
    same(found, expected)
    assert not any(array.flags.writeable for array in found.values())


def test_arrays_of_flax_may_be_halves_scalars_or_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 32)
    grid = np.arange(60, dtype=np.float32).reshape(3, 20)
    tree = {"b": jnp.array(HALVES[:2], jnp.bfloat16), "s": np.float32(7), "x": {"kernel": grid}, "e": grid[:, :0]}
    serialize(tree, tmp_path)
    assert (tmp_path / "flax_model.msgpack").read_bytes().count(b"chunked") == 1
    expected = {"b": np.array(HALVES[:2], np.float32), "s": np.array(7, np.float32), "x.weight": grid.T}
    same(read_weights(tmp_path), expected | {"e": np.zeros((3, 0), np.float32)})


MSGPACK = flax.serialization.msgpack_serialize({"x": {"kernel": A, "bias": A[0]}})
BROKEN_MSGPACK = {
    "empty": (b"", "expected a tree of arrays in msgpack"),
    "cut short": (MSGPACK[:-1], r"\(cut short\)"),
    "cut in the middle": (MSGPACK[:11], r"\(cut short\)"),
    "too long": (MSGPACK + b"\0", rf"one of {len(MSGPACK)} bytes in {len(MSGPACK) + 1}"),
    "a list": (b"\x91\x80", "something else"),
    "an array alone": (flax.serialization.msgpack_serialize(A), "something else"),
    "a number for an array": (b"\x81\xa1a\x01", "'a' is not an array"),
    "a key that is no name": (b"\x81\x01\x80", "the key 1"),
    "a name twice": (b"\x82\xa1a\x80\xa1a\x80", "'a' is there twice"),
    "two names that become one": (
        flax.serialization.msgpack_serialize({"kernel": A, "scale": A}),
        "'weight' is there twice",
    ),
    "a code of no meaning": (b"\x81\xa1a\xc1", "the code 0xc1"),
    "2^32 keys": (b"\xdf\xff\xff\xff\xff", r"\(cut short\)"),
    "a list of 2^32": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "a list of 4294967295"),
    "lists in lists": (b"\x81\xa1a" + b"\x91" * 100_000, "too deep"),
    "arrays in arrays": (b"\x81\xa1a" + b"\xc9\xff\xff\xff\xff\x01\x93" * 2, r"\(cut short\)"),
    "arrays without end": (b"\x81\xa1a" + b"\xc7\x00\x01" * 100_000, "too deep"),
    "objects": (MSGPACK.replace(b"float32", b"object_"), "dtype 'object_'"),
    "another shape": (MSGPACK.replace(b"\x93\x92\x02\x03", b"\x93\x92\x02\x04"), r"shape \[2, 4\] has 24 bytes"),
    "text for bytes": (b"\x81\xa1a\xc7\x0e\x01\x93\x91\x01\xa7float32\xa2hi", "an array of the dtype 'float32'"),
    "chunks without a shape": (b"\x81\xa1a\x81\xb9__msgpack_chunked_array__\xc3", "'shape'"),
}


@pytest.mark.parametrize("name", BROKEN_MSGPACK)
def test_broken_msgpack_is_refused_in_one_line(name, tmp_path):
    data, message = BROKEN_MSGPACK[name]
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    assert_refused(tmp_path, message)


# -- trees -------------------------------------------------------------------------------------------------------------

TREE = {"encoder": {"up": {"kernel": A.T, "bias": jnp.array(A[0])}, "step": np.array(3, np.int32)}, "w": A}


def test_a_tree_comes_back_with_the_metadata_beside_it(tmp_path):
    write_tree(tmp_path / "w", TREE, {"task": "é"})
    found, _ = read_tree(tmp_path / "w")
    same(found["encoder"].pop("up"), {"kernel": A.T, "bias": A[0]})
    same(found.pop("encoder"), {"step": np.array(3, np.int32)})
    same(found, {"w": A})
    raw = (tmp_path / "w").read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    metadata = header["__metadata__"]
    assert set(header) == {"__metadata__", "encoder/up/kernel", "encoder/up/bias", "encoder/step", "w"}
    assert metadata["task"] == "é"
    blank = raw.replace(metadata["sha256"].encode(), b"0" * 64)
    assert metadata["sha256"] == hashlib.sha256(blank).hexdigest()


def test_bfloat16_halves_the_file_and_comes_back_as_the_nearest_float32(tmp_path):
    values = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8], [-3.1415927, 1e-30, 65504.0]], np.float32)
    # a bfloat16 has 8 significant bits: ties go to the even one
    nearest = np.array([[1.0, 1.0, 1 + 2**-6], [-3.140625, 0, 65536.0]], np.float32)
    write_tree(tmp_path / "w", {"a": {"b": values}, "n": IDS}, dtype="bfloat16")
    found, _ = read_tree(tmp_path / "w")
    np.testing.assert_allclose(found["a"]["b"][1, 1], 1e-30, rtol=2**-8)
    nearest[1, 1] = found["a"]["b"][1, 1]
    same(found["a"], {"b": nearest})
    same({"n": found["n"]}, {"n": IDS})
    raw = (tmp_path / "w").read_bytes()
    assert len(raw) - 8 - struct.unpack("<Q", raw[:8])[0] == 2 * values.size + IDS.nbytes


def test_a_flipped_bit_anywhere_in_a_tree_is_found(tmp_path):
    write_tree(tmp_path / "w", {"a": {"b": A[0]}}, {"task": "tag"})
    raw = (tmp_path / "w").read_bytes()
    for bit in [*range(64), *range(64, 8 * len(raw), 3)]:
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "w").write_bytes(changed)
        with pytest.raises(UserError):
            read_tree(tmp_path / "w")
    (tmp_path / "w").write_bytes(raw)
    same(read_tree(tmp_path / "w")[0]["a"], {"b": A[0]})


def test_a_tree_that_is_missing_or_not_ours_is_refused(tmp_path):
    assert_refused(tmp_path / "w", r"cannot be read \(No such file or directory\)", read_tree)
    write_safetensors(tmp_path / "w", {"a": A})
    assert_refused(tmp_path / "w", "has no checksum; expected a file that electrax wrote", read_tree)
    write_tree(tmp_path / "w", {"a": A})
    raw = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(raw[:-1] + bytes([raw[-1] ^ 64]))
    assert_refused(tmp_path / "w", "damaged", read_tree)


# -- damage of any kind ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["safetensors", "msgpack", "index", "torch"])
def directory(request, tmp_path_factory):
    """A good directory and the file in it to damage."""
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "safetensors":
            (folder / "model.safetensors").write_bytes(WHOLE)
        case "msgpack":
            (folder / "flax_model.msgpack").write_bytes(MSGPACK)
        case "index":
            shards(folder, x={"a": A}, y={"ids": IDS})
        case "torch":
            torch = pytest.importorskip("torch")
            torch.save({"a": torch.tensor(A), "h": torch.tensor(HALVES).half()}, folder / "pytorch_model.bin")
    return next(path for path in folder.iterdir() if path.name not in ("x.safetensors", "y.safetensors"))


DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@hypothesis.given(DAMAGE, st.sampled_from(["set", "flip", "cut", "drop", "double"]))
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_a_damaged_file_is_refused_or_gives_arrays_and_nothing_else_happens(directory, places, kind):
    whole = directory.read_bytes()
    data = bytearray(whole)
    for place, byte in places:
        at = int(place * len(data))
        match kind:
            case "set":
                data[at : at + 1] = [byte]
            case "flip":
                data[at : at + 1] = [data[at] ^ (1 << byte % 8)] if data else b""
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + byte]
            case "double":
                data[at:at] = data[at : at + byte]
    directory.write_bytes(data)
    try:
        found = read_weights(directory.parent)
        assert all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in found.items())
        assert all(np.sum(array) is not None for array in found.values())  # every byte can be touched
    except UserError as error:
        assert "\n" not in str(error) and str(directory.parent) in str(error)
    finally:
        directory.write_bytes(whole)


def test_an_old_torch_is_not_asked_to_read_a_file(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor(A)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert_refused(tmp_path, "torch 2.5.1.cpu can be made to run code by a file .*; expected torch 2.6 or newer")


def test_names_in_msgpack_are_of_a_bounded_length(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize({"x" * 1025: {"a": A}}))
    assert_refused(tmp_path, "the key 'xxx")
