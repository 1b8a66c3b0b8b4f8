"""Tensor bundles, the files of TensorFlow's checkpoints, read without TensorFlow.

`tf.train.Saver` (V2) writes a LevelDB table `PREFIX.index`, which says of every variable its type, shape and place
(tensorflow/core/protobuf/tensor_bundle.proto), and the bytes of them all as `PREFIX.data-00000-of-00001` and on.
"""

import functools
import math
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from electrax.config import UserError
from electrax.data.outside import read_bytes

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER = 48  # bytes
MAX_INDEX_BYTES = 8 << 20  # BERT-large's with all slots of its optimizer is of 0.1 MB
LONGEST_NAME = 1024  # of a key; names share beginnings, so that a small table could hold very much
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 19: np.float16}
OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"  # in what TensorFlow 2's tf.train.Checkpoint writes
LANE, LANES = 64, 2**16  # of a checksum: bytes, and how many go side by side


class Place(NamedTuple):
    """Where the bytes of a variable lie."""

    shard: int
    offset: int
    size: int
    checksum: int
    dtype: type
    shape: tuple[int, ...]


def read_bundle(
    index: pathlib.Path, unwanted: Callable[[str], str | None]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The variables, and the names of those for which `unwanted` gives a reason not to read them, with the reason.

    Raises UserError for a damaged or missing file, and for what ELECTRA's and BERT's programs do not write: compressed
    blocks, partitioned variables, types other than numbers."""
    try:
        table = _read_table(read_bytes(index, MAX_INDEX_BYTES))
        left_out = {name: reason for name in table if (reason := unwanted(name))}
        shards, places = _read_entries(table, left_out)
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{index}: {error}") from None
    variables: dict[str, np.ndarray] = {}
    for shard in sorted({place.shard for place in places.values()}):
        data = index.with_name(f"{index.stem}.data-{shard:05d}-of-{shards:05d}")
        try:
            variables.update(_read_shard(data, {n: place for n, place in places.items() if place.shard == shard}))
        except OSError as error:
            raise UserError(f"{data}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{data}: {error}") from None
    return variables, left_out


def _read_table(table: bytes) -> dict[str, bytes]:
    """The records of a LevelDB table by their keys. Raises ValueError for one that is damaged."""
    if len(table) < FOOTER or table[-8:] != MAGIC:
        raise ValueError("not the index of a TensorFlow checkpoint, or cut off")
    blocks, footer = table[:-FOOTER], table[-FOOTER:]
    *filters, at = _handle(footer, 0)
    _block(blocks, *filters)  # which TensorFlow leaves empty
    *top, _ = _handle(footer, at)
    records, before, last = {}, None, 0
    for _, handle in _records(_block(blocks, *top)):
        offset, size, _ = _handle(handle, 0)
        if offset < last:
            raise ValueError("damaged: its blocks overlap")
        last = offset + size
        for key, value in _records(_block(blocks, offset, size)):
            if before is not None and key <= before:
                raise ValueError("damaged: its names are in no order")
            before = key
            name = key.decode("utf-8", "backslashreplace").encode("unicode_escape").decode()  # one line in a message
            records[name] = value
    return records


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next one begins."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("damaged: a number is cut off")


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """Where a block begins, its size, and where the next handle begins."""
    offset, at = _varint(data, at)
    return offset, *_varint(data, at)


def _block(table: bytes, offset: int, size: int) -> bytes:
    """After it stand a byte for its compression and the checksum of both."""
    end = offset + size + 1
    if end + 4 > len(table):
        raise ValueError("damaged: a block lies beyond the end")
    if masked_crc32c(table[offset:end]) != int.from_bytes(table[end : end + 4], "little"):
        raise ValueError("damaged: the checksum of a block is not that of its bytes")
    if table[end - 1]:
        raise ValueError("its blocks are compressed, which TensorFlow's own never are")
    return table[offset : end - 1]


def _records(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values. A key is given by how much it shares with the one before, and the rest; at the block's end stand
    the places of keys given whole, and how many these are."""
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if len(block) < 4 or end < 0:
        raise ValueError("damaged: a block is cut off")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or shared + rest > LONGEST_NAME or at + rest + size > end:
            raise ValueError("damaged: a record goes beyond its block")
        key, at = key[:shared] + block[at : at + rest], at + rest
        yield key, block[at : at + size]
        at += size


def _fields(message: bytes) -> Mapping[int, list]:
    """The fields of a protocol buffer by their tags (eight times the number, and the form); bytes or numbers."""
    fields: dict[int, list] = defaultdict(list)
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        form = tag & 7
        if form == 0:
            value, at = _varint(message, at)
        elif form in (1, 2, 5):
            size, at = _varint(message, at) if form == 2 else ({1: 8, 5: 4}[form], at)
            value, at = message[at : at + size], at + size
        else:
            raise ValueError("damaged: a field of an unknown form")
        if at > len(message):
            raise ValueError("damaged: a field is cut off")
        fields[tag].append(value)
    return fields


def _read_entries(table: Mapping[str, bytes], left_out: Mapping[str, str]) -> tuple[int, dict[str, Place]]:
    """The number of files of data, and the places of the variables but those left out, in their order in the data."""
    if OBJECTS in table:
        raise ValueError("a checkpoint of TensorFlow 2's objects; expected one that tf.train.Saver wrote")
    header = _fields(table.get("", b""))
    shards = header.get(0x08, [0])[-1]
    if not 0 < shards < 100_000:
        raise ValueError(f"damaged: it says that there are {shards} files of data")
    if header.get(0x10, [0])[-1]:
        raise ValueError("written by a big-endian machine; expected a little-endian one's")
    places = {
        name: _place(name, _fields(record), shards) for name, record in table.items() if name and name not in left_out
    }
    return shards, dict(sorted(places.items(), key=lambda item: item[1][:3]))


def _place(name: str, entry: Mapping[int, list], shards: int) -> Place:
    if 0x3A in entry:
        raise ValueError(f"{name} is partitioned, which electrax does not read; expected a variable in one piece")
    kind, shard, offset, size = (entry.get(tag, [0])[-1] for tag in (0x08, 0x18, 0x20, 0x28))
    if kind not in DTYPES:
        raise ValueError(f"{name} is of TensorFlow's type {kind}; expected one of {', '.join(map(str, DTYPES))}")
    axes = [_fields(axis) for axis in _fields(entry.get(0x12, [b""])[-1]).get(0x12, [])]
    shape = tuple(axis.get(0x08, [0])[-1] for axis in axes)
    if len(shape) > 8 or max((size, *shape)) >= 2**40 or math.prod(shape) * np.dtype(DTYPES[kind]).itemsize != size:
        raise ValueError(f"damaged: the shape of {name} does not fit its {size} bytes")
    if shard >= shards:
        raise ValueError(f"damaged: {name} lies in the file {shard} of {shards}")
    checksum = int.from_bytes(entry.get(0x35, [b""])[-1], "little")
    return Place(shard, offset, size, checksum, DTYPES[kind], shape)


# -- the data ----------------------------------------------------------------------------------------------------------


def _read_shard(path: pathlib.Path, places: Mapping[str, Place]) -> Iterator[tuple[str, np.ndarray]]:
    """Its variables, which stand in the order of their places."""
    last = 0
    with open(path, "rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        for name, place in places.items():
            if place.offset + place.size > length:
                raise ValueError(f"cut off: {name} ends at {place.offset + place.size} bytes, the file at {length}")
            if place.offset < last:
                raise ValueError(f"damaged: {name} begins within another variable")
            last = place.offset + place.size
            file.seek(place.offset)
            data = np.fromfile(file, np.uint8, place.size)
            if masked_crc32c(data) != place.checksum:
                raise ValueError(f"damaged: the checksum of {name} is not that of its bytes")
            yield name, data.view(place.dtype).reshape(place.shape)


# -- checksums ---------------------------------------------------------------------------------------------------------


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """The checksum of bytes (RFC 3720) as LevelDB and TensorFlow store it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def crc32c(data: bytes | np.ndarray) -> int:
    data = np.frombuffer(data, np.uint8)
    register = 2**32 - 1
    for start in range(0, len(data), LANE * LANES):
        register = _advance(register, data[start : start + LANE * LANES])
    return register ^ 2**32 - 1


def _advance(register: int, chunk: np.ndarray) -> int:
    """The register after the bytes of a chunk. Its lanes go side by side, each from a register of zeros, and neighbours
    are joined: what the first one's becomes in as many zeros, and the second's."""
    table, steps = _crc_tables()
    levels = ((len(chunk) - 1) // LANE).bit_length()
    padded = np.zeros(LANE << levels, np.uint8)  # zeros in front leave a register of zeros as it is
    message = padded[-len(chunk) :]
    message[:] = chunk
    message[:4] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)[: len(chunk)]
    lanes = np.zeros(1 << levels, np.uint32)
    for column in np.ascontiguousarray(padded.view("<u2").reshape(1 << levels, -1).T):
        lanes = table[lanes.astype(np.uint16) ^ column] ^ lanes >> 16
    for step in steps[:levels]:
        lanes = _apply(step, lanes[::2]) ^ lanes[1::2]
    return int(lanes[0]) ^ register >> 8 * min(4, len(chunk))


@functools.cache
def _crc_tables() -> tuple[np.ndarray, list[np.ndarray]]:
    """What two bytes do to a register, [65536]; and what a lane of zeros, two, four and so on do to each bit, [32]."""
    table = np.arange(2**16, dtype=np.uint32)
    for _ in range(16):
        table = table >> 1 ^ np.uint32(0x82F63B78) * (table & 1)
    step = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(LANE // 2):
        step = table[step & 0xFFFF] ^ step >> 16
    steps = [step]
    while 1 << len(steps) < LANES:
        steps.append(_apply(steps[-1], steps[-1]))
    return table, steps


def _apply(step: np.ndarray, registers: np.ndarray) -> np.ndarray:
    bits = registers[:, None] >> np.arange(32, dtype=np.uint32) & 1
    return np.bitwise_xor.reduce(bits * step, axis=1)
