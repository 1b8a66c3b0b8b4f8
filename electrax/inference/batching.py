"""Texts of mixed lengths in few shapes with little padding."""

from collections.abc import Iterator, Sequence

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
