"""Texts of mixed lengths in few shapes with little padding."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int, Int64

LADDER = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # tokens a row is padded to; beyond: multiples of 512


def padded_length(length: int) -> int:
    return next((step for step in LADDER if length <= step), -(-length // LADDER[-1]) * LADDER[-1])


def by_length(lengths: Sequence[int], tokens: int = 1024) -> Iterator[tuple[Int64[np.ndarray, " B"], int]]:
    """(row numbers, padded length) of batches that hold every row once, short rows first; -1 fills a batch.

    A batch has about `tokens` tokens: a function of the length alone, so that a length has one shape.
    """
    padded = np.array([padded_length(n) for n in lengths], np.int64)
    for length in np.unique(padded):
        rows, size = np.flatnonzero(padded == length), max(1, tokens // int(length))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            yield np.pad(some, (0, size - len(some)), constant_values=-1).astype(np.int64), int(length)


def pad(
    rows: Sequence[Sequence[int]], numbers: Int64[np.ndarray, " B"], length: int, fill: int
) -> Int[np.ndarray, "B L"]:
    """Those rows as one array; -1 is a row of `fill`."""
    out = np.full((len(numbers), length), fill, np.int32)
    for place, number in enumerate(numbers):
        if number >= 0:
            out[place, : len(rows[number])] = rows[number]
    return out


def run_by_length(
    forward: Callable[..., jax.Array], columns: Sequence[tuple[Sequence[Sequence[int]], int]], most: int
) -> Iterator[tuple[Int64[np.ndarray, " n"], np.ndarray]]:
    """(row numbers, what `forward` makes of those rows), short rows first, every row once.

    `columns`: for each argument of `forward` the rows and what pads them; all have the same lengths, at most `most`.
    The shape a row is in depends on its length alone, so that its result does not depend on the others.
    """
    waiting = []  # one batch runs while the next is put together
    for numbers, length in by_length([len(row) for row in columns[0][0]]):
        waiting.append((numbers, forward(*(pad(rows, numbers, min(length, most), fill) for rows, fill in columns))))
        if len(waiting) > 1:
            yield _real(*waiting.pop(0))
    for each in waiting:
        yield _real(*each)


def _real(numbers: np.ndarray, outputs: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Without the rows that only fill the batch."""
    return numbers[numbers >= 0], np.asarray(outputs)[numbers >= 0]
