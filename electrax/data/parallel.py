"""Pairs of a text and what it shall become: two files line by line, and batches of pairs that are padded apart."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from electrax.config import UserError
from electrax.data.batches import PairBuckets
from electrax.data.encoded import TokenRows
from electrax.data.examples import BadRow, BadRows, TextExample, collect, read_lines, text_fault


def read_parallel(source: str | os.PathLike, target: str | os.PathLike, bad: BadRows) -> list[TextExample]:
    """Line n of `source` with line n of `target` as its label. An empty line is a bad row; files of unequal length are
    a UserError that names the first line that only one of them has."""
    return collect(_pairs(os.fspath(source), os.fspath(target)), bad, source)


def _pairs(source: str, target: str) -> Iterator[TextExample | BadRow]:
    for number, (first, second) in enumerate(itertools.zip_longest(read_lines(source), read_lines(target)), 1):
        if first is None or second is None:
            longer, shorter = (source, target) if second is None else (target, source)
            raise UserError(f"{longer}, line {number}: {shorter} ends before it; expected as many lines in both")
        where = f"{source}, line {number}"
        texts = [line.text.rstrip("\r\n") for line in (first, second)]
        faults = [
            (path, line.fault or text_fault(text, "the line"))
            for path, line, text in zip((source, target), (first, second), texts, strict=True)
        ]
        path, fault = next((found for found in faults if found[1]), ("", None))
        yield BadRow(f"{path}, line {number}", *fault) if fault else TextExample(where, (texts[0],), texts[1])


@dataclass(frozen=True)
class PairRows:
    """N rows of two texts each."""

    source: TokenRows
    target: TokenRows

    @property
    def lengths(self) -> Int64[np.ndarray, "N 2"]:
        return np.stack([self.source.lengths, self.target.lengths], axis=1)

    @property
    def text_lengths(self) -> Int64[np.ndarray, " T"]:
        return self.lengths.ravel()

    def __len__(self) -> int:
        return len(self.source)

    def sha256(self, leave_out: str = "") -> str:
        """As TokenRows.sha256, of both texts."""
        return self.source.sha256(leave_out) + self.target.sha256(leave_out)

    def batch(
        self, rows: Int64[np.ndarray, " B"], lengths: tuple[int, int], pads: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """`ids` [B, S] and `target` [B, T] int32, padded, and `weight` [B], 0 for the row -1."""
        found = self.source.batch(rows, lengths[0], {"ids": pads[0]})
        target = self.target.batch(rows, lengths[1], {"ids": pads[1]})["ids"]
        return found | {"target": target}


@dataclass(frozen=True)
class PairBatches:
    """Pairs as the batches of a split, as RowBatches has them: `step` -> pairs of nearly the same two lengths."""

    rows: PairRows
    buckets: PairBuckets
    pads: tuple[int, int]

    @staticmethod
    def of(
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        batch_size: int,
        pads: tuple[int, int],
        most: int,
        multiple: int = 1,
    ) -> "PairBatches":
        rows = PairRows(TokenRows.of(source), TokenRows.of(target))
        return PairBatches(rows, PairBuckets(rows.lengths, batch_size, most, multiple), pads)

    def train_batch(self, step: int, seed: int, part: slice) -> dict[str, np.ndarray]:
        rows, lengths = self.buckets.train_rows(step, seed)
        return self.rows.batch(rows[part], lengths, self.pads)

    def eval_batches(self, part: slice) -> Iterator[tuple[dict[str, np.ndarray], Int64[np.ndarray, " B"]]]:
        for rows, lengths in self.buckets.eval_rows():
            yield self.rows.batch(rows[part], lengths, self.pads), rows[part]

    def longest(self) -> dict[str, np.ndarray]:
        """A batch of the largest shape."""
        rows = np.resize(np.argsort(-self.rows.lengths.sum(axis=1), kind="stable"), self.buckets.batch_size)
        first, second = self.buckets.buckets.max(axis=0)
        return self.rows.batch(rows.astype(np.int64), (int(first), int(second)), self.pads)
