"""Texts as token rows of different lengths, kept between runs, and batches of them with little padding."""

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int64

from electrax.config import UserError
from electrax.data.batches import LengthBuckets
from electrax.data.tokenizer import Tokenizer
from electrax.storage import own_cache

CACHE_VERSION = 1
DIGEST_BYTES = 32  # SHA-256, at the start of a file of the cache
log = logging.getLogger("electrax")


@dataclass(frozen=True)
class TokenRows:
    """N ragged rows. `tokens`: one value a token, all rows end to end, "ids" among them; `fields`: one value a row.

    A row may be `group` texts (the choices of a question), which are batched as [B, group, L].
    """

    starts: Int64[np.ndarray, " S"]  # of each text in the tokens, and the end of the last
    tokens: dict[str, np.ndarray]
    fields: dict[str, np.ndarray]
    group: int = 1

    @staticmethod
    def of(ids: Sequence[Sequence[int]], tokens: dict[str, Sequence[Sequence[int]]] | None = None) -> "TokenRows":
        """From lists; every list of `tokens` is as long as that of `ids`."""
        starts = np.cumsum([0, *map(len, ids)]).astype(np.int64)
        flat = {name: np.fromiter((v for row in rows for v in row), np.int32, starts[-1])
                for name, rows in {"ids": ids, **(tokens or {})}.items()}  # fmt: skip
        return TokenRows(starts, flat, {})

    @property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Of the longest text of each row."""
        return self.text_lengths.reshape(-1, self.group).max(axis=1)

    @property
    def text_lengths(self) -> Int64[np.ndarray, " T"]:
        """Of each text; a row is `group` of them."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.group

    def sha256(self, leave_out: str = "") -> str:
        """Of everything in the rows but one field."""
        digest = hashlib.sha256(self.starts.tobytes())
        fields = [(name, values) for name, values in sorted(self.fields.items()) if name != leave_out]
        for name, values in [*sorted(self.tokens.items()), *fields]:
            digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def with_fields(self, **fields: np.ndarray) -> "TokenRows":
        return replace(self, fields={**self.fields, **fields})

    def batch(self, rows: Int64[np.ndarray, " B"], length: int, fill: dict[str, int]) -> dict[str, np.ndarray]:
        """Those rows as arrays: tokens [B, (group,) length] int32 padded with `fill`, the fields, and `weight` [B]
        float32, which is 0 for the row -1: padding alone, with the fields of row 0."""
        texts = rows if self.group == 1 else rows[:, None] * self.group + np.arange(self.group)
        lengths = np.where(texts < 0, 0, self.text_lengths[texts])[..., None]
        within = np.arange(length)
        real = within < lengths
        places = np.where(real, self.starts[texts][..., None] + within, 0)
        out = {name: np.where(real, values[places], fill[name]).astype(np.int32)
               for name, values in self.tokens.items()}  # fmt: skip
        out |= {name: values[np.maximum(rows, 0)] for name, values in self.fields.items()}
        return out | {"weight": (rows >= 0).astype(np.float32)}


@dataclass(frozen=True)
class RowBatches:
    """Token rows as the batches of a split: `step` -> rows of nearly one length."""

    rows: TokenRows
    buckets: LengthBuckets
    fill: dict[str, int]  # the padding of each token array

    @staticmethod
    def of(
        rows: TokenRows,
        batch_size: int,
        fill: dict[str, int],
        shapes: int = 12,
        least: int | None = None,
        multiple: int = 1,
    ) -> "RowBatches":
        """Batches of that size, `shapes` and `multiple` as in LengthBuckets. With a `least` one the size is halved,
        down to a multiple of that, while a tenth of the tokens is padding because there are several batches, but fewer
        than `shapes`."""
        buckets = LengthBuckets(rows.lengths, batch_size, shapes, multiple)
        while (
            least and batch_size % (2 * least) == 0 and 1 < buckets.batches < shapes and buckets.padding_share() > 0.1
        ):
            batch_size //= 2
            buckets = LengthBuckets(rows.lengths, batch_size, shapes, multiple)
        return RowBatches(rows, buckets, fill)

    def train_batch(self, step: int, seed: int, part: slice) -> dict[str, np.ndarray]:
        rows, length = self.buckets.train_rows(step, seed)
        return self.rows.batch(rows[part], length, self.fill)

    def eval_batches(self, part: slice) -> Iterator[tuple[dict[str, np.ndarray], Int64[np.ndarray, " B"]]]:
        for rows, length in self.buckets.eval_rows():
            yield self.rows.batch(rows[part], length, self.fill), rows[part]

    def longest(self) -> dict[str, np.ndarray]:
        """A batch of the largest shape."""
        rows = np.resize(np.argsort(-self.rows.lengths, kind="stable"), self.buckets.batch_size)
        return self.rows.batch(rows.astype(np.int64), int(self.buckets.buckets[-1]), self.fill)


def encode_pairs(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]], max_length: int
) -> tuple[list[list[int]], Bool[np.ndarray, " N"]]:
    """`[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, at most `max_length` tokens, and which rows had to be cut.

    Of a pair the longer text loses its last token until both fit, the second where they are equally long (the
    reference's rule).
    """
    flat = tokenizer.encode_batch([text for row in texts for text in row])
    rows, cut, place = [], np.zeros(len(texts), bool), 0
    for number, row in enumerate(texts):
        parts = flat[place : place + len(row)]
        place += len(row)
        room = max_length - 1 - len(row)
        kept = _shares([len(part) for part in parts], room)
        cut[number] = sum(kept) < sum(map(len, parts))
        ids = [tokenizer.cls_id]
        for part, size in zip(parts, kept, strict=True):
            ids += [*part[:size], tokenizer.sep_id]
        rows.append(ids)
    return rows, cut


def _shares(lengths: list[int], room: int) -> list[int]:
    """How much of one or two texts is kept."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    a, b = lengths
    first = min(a, max(room - b, (room + 1) // 2))  # tokens go from the longer one, from b where they are equal
    return [first, room - first]


def kept(build: Callable[[], TokenRows], *content: object) -> TokenRows:
    """What `build` makes, from the cache where the same `content` (JSON values) was built before.

    A damaged file of the cache is built again; a cache that cannot be written, or is not the user's, is done without.
    """
    key = hashlib.sha256(json.dumps([CACHE_VERSION, *content]).encode("utf-8", "surrogatepass")).hexdigest()
    try:
        path = own_cache("rows") / f"{key}.npz"
    except (OSError, UserError) as error:
        log.warning("encoded rows are not kept: %s", error)
        return build()
    rows = _read_rows(path)
    if rows is None:
        rows = build()
        _write_rows(path, rows)
    return rows


def _read_rows(path: pathlib.Path) -> TokenRows | None:
    """None where there is no such file, or its content does not fit its checksum."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, packed = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(packed).digest() != digest:
        return None
    with np.load(io.BytesIO(packed), allow_pickle=False) as file:
        arrays = dict(file)
    tokens = {name.removeprefix("token_"): a for name, a in arrays.items() if name.startswith("token_")}
    fields = {name.removeprefix("field_"): a for name, a in arrays.items() if name.startswith("field_")}
    return TokenRows(arrays["starts"], tokens, fields)


def _write_rows(path: pathlib.Path, rows: TokenRows) -> None:
    arrays = {f"token_{name}": a for name, a in rows.tokens.items()}
    arrays |= {f"field_{name}": a for name, a in rows.fields.items()}
    packed = io.BytesIO()
    np.savez(packed, starts=rows.starts, **arrays)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(hashlib.sha256(packed.getbuffer()).digest())
            file.write(packed.getbuffer())
        os.replace(partial, path)
    except OSError:  # a full disk, a directory that may not be written
        with contextlib.suppress(OSError):
            partial.unlink()
