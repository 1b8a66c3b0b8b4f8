"""A writer of TensorFlow's checkpoints, of wrong ones too."""

import pathlib
import struct

import numpy as np


def bit_by_bit(data: bytes) -> int:
    register = 2**32 - 1
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 2**32 - 1


def masked(data: bytes) -> bytes:
    crc = bit_by_bit(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def varint(number: int) -> bytes:
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def field(number: int, content: int | bytes) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(dtype=1, shape=(2,), shard=0, offset=0, size=8, data=bytes(8), more=b"") -> bytes:
    """A record of BundleEntryProto."""
    axes = b"".join(field(2, field(1, axis)) for axis in shape)
    places = field(3, shard) + field(4, offset) + field(5, size)
    return field(1, dtype) + field(2, axes) + places + b"\x35" + masked(data) + more


def block(records: dict[bytes, bytes], kind: int = 0) -> bytes:
    """With a key in full only at its beginning."""
    content, before = b"", b""
    for key, record in records.items():
        shared = next(
            (i for i, (a, b) in enumerate(zip(key, before, strict=False)) if a != b), min(map(len, (key, before)))
        )
        content += varint(shared) + varint(len(key) - shared) + varint(len(record)) + key[shared:] + record
        before = key
    content += struct.pack("<II", 0, 1) + bytes([kind])
    return content + masked(content)


def table(*blocks: bytes) -> bytes:
    """An index of these blocks; TensorFlow writes one of filters, too, without any."""
    *handles, filters = handles_of(*blocks, block({}))
    return finish(b"".join([*blocks, block({})]), filters, *handles)


def handles_of(*blocks: bytes) -> list[bytes]:
    starts = np.cumsum([0, *map(len, blocks)])
    return [varint(int(start)) + varint(len(one) - 5) for start, one in zip(starts, blocks, strict=False)]


def finish(content: bytes, filters: bytes, *handles: bytes) -> bytes:
    top = block({bytes([i]): handle for i, handle in enumerate(handles)})
    footer = filters + varint(len(content)) + varint(len(top) - 5)
    return content + top + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def index_of(**records: bytes) -> bytes:
    return table(block({b"": field(1, 1), **{name.encode(): record for name, record in records.items()}}))


def write(prefix: pathlib.Path, arrays: dict[str, np.ndarray], blocks: int = 1) -> None:
    """A checkpoint in one shard."""
    types = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
    data, records = b"", {b"": field(1, 1)}
    for name, array in sorted(arrays.items()):
        content, kind = array.tobytes(), types.get(array.dtype.name, 1)
        records[name.encode()] = entry(kind, array.shape, 0, len(data), len(content), content)
        data += content
    each = -(-len(records) // blocks)
    cut = [dict(list(records.items())[i : i + each]) for i in range(0, len(records), each)]
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(*map(block, cut)))
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
