"""Which rows make up a batch: pure functions of (seed, step), with no iterator to save and no O(size) memory."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

ROUNDS = 3  # of both halves
MOST_PADDING = 0.08  # of the tokens, where the number of shapes allows it
_31, _32 = np.uint64(31), np.uint64(32)
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permuted(index: Int64[np.ndarray, " B"], size: int, key: tuple[int, int]) -> Int64[np.ndarray, " B"]:
    """Position -> row under the shuffle `key` = (seed, epoch): a bijection of range(size).

    A Feistel network over pairs (left < a, right < b) with a·b just above `size`, where each half in turn is shifted
    by a keyed hash of the other; a result that is not below `size` goes through again (cycle walking; rare).
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = _round_keys(*key, size)
    rows = _feistel(index.astype(np.uint64), np.uint64(a), np.uint64(b), keys)
    while (outside := rows >= size).any():
        rows[outside] = _feistel(rows[outside], np.uint64(a), np.uint64(b), keys)
    return rows.astype(np.int64)


def train_rows(step: int, batch_size: int, size: int, seed: int) -> Int64[np.ndarray, " B"]:
    """The rows of batch `step`. Each epoch has its own order and sees each row once; a batch may straddle epochs."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, positions = np.divmod(positions, size)
    rows = np.empty_like(positions)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        rows[here] = permuted(positions[here], size, (seed, epoch))
    return rows


def eval_batches(size: int, batch_size: int) -> Iterator[Int64[np.ndarray, " B"]]:
    """Every row once, in order; the last batch is filled with -1, for the caller to weight 0."""
    for start in range(0, size, batch_size):
        rows = np.arange(start, start + batch_size, dtype=np.int64)
        yield np.where(rows < size, rows, -1)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch, size]).generate_state(2 * ROUNDS, np.uint64)


def _feistel(values: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, b)
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _hash(right, left_key)) % a
        right = (right + _hash(left, right_key)) % b
    return left * b + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Multiply, fold, multiply, with splitmix64's constants; uint64 arithmetic wraps around."""
    mixed = (values + key) * _MULTIPLIER_1
    mixed = (mixed ^ (mixed >> _32)) * _MULTIPLIER_2
    return mixed >> _31  # a sum with a half cannot wrap around


# -- rows of different lengths -----------------------------------------------------------------------------------------


def bucket_lengths(lengths: Int64[np.ndarray, " N"], most: int) -> Int64[np.ndarray, " K"]:
    """The at most `most` lengths that leave the least padding when each row is padded to the next of them.

    Exact, by dynamic programming over the distinct lengths: O(most · distinct²).
    """
    values, counts = np.unique(lengths, return_counts=True)
    rows, tokens = np.cumsum(counts), np.cumsum(counts * values)
    # padding[i, j]: of rows with the lengths after place i up to place j, padded to values[j]; i = -1 is stored last
    before_rows, before_tokens = np.append(rows, 0), np.append(tokens, 0)
    padding = values[None] * (rows[None] - before_rows[:, None]) - (tokens[None] - before_tokens[:, None])
    padding = np.where(np.arange(len(values))[None] > np.append(np.arange(len(values)), -1)[:, None], padding, np.inf)
    best, choices = padding[-1], []
    for _ in range(min(most, len(values)) - 1):
        total = best[:, None] + padding[:-1]
        choice = np.argmin(total, axis=0)
        better = total[choice, np.arange(len(values))] < best
        choices.append(np.where(better, choice, -1))
        best = np.where(better, total[choice, np.arange(len(values))], best)
    chosen, place = [len(values) - 1], len(values) - 1
    for choice in reversed(choices):
        if choice[place] >= 0:
            place = int(choice[place])
            chosen.append(place)
    return values[chosen[::-1]]


def _shuffled(key: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).permutation(size)


class LengthBuckets:
    """Batches of rows of nearly one length: each row once an epoch, in as few shapes as keep the padding below 8 %, at
    most in `most`, whose lengths are multiples of `multiple`.

    The length of an epoch's j-th batch does not depend on the seed, only which rows of about that length it holds.
    """

    def __init__(self, lengths: Int64[np.ndarray, " N"], batch_size: int, most: int = 12, multiple: int = 1):
        self.lengths, self.batch_size = lengths, batch_size
        self.batches = -(-len(lengths) // batch_size)  # an epoch
        order = np.argsort(lengths, kind="stable")
        ends = np.minimum((np.arange(len(lengths)) // batch_size + 1) * batch_size, len(lengths))
        needed = np.empty_like(lengths)  # by the batch of each row, were all in order of length:
        needed[order] = lengths[order[ends - 1]]  # so buckets hold whole batches
        needed = -(-needed // multiple) * multiple
        for count in range(1, most + 1):
            self.buckets = bucket_lengths(needed, count)
            self._bucket = np.searchsorted(self.buckets, needed)
            if lengths.sum() > (1 - MOST_PADDING) * self.buckets[self._bucket].sum():
                break
        self._epoch = functools.lru_cache(maxsize=2)(self._order_of)

    def train_rows(self, step: int, seed: int) -> tuple[Int64[np.ndarray, " B"], Any]:
        """The rows of batch `step` and the length they are padded to; -1 fills the last batch of an epoch."""
        epoch, place = divmod(step, self.batches)
        order, places = self._epoch(seed, epoch)
        return self._cut(order, int(places[place]))

    def _order_of(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch by bucket, shuffled within it, and the order in which its batches come."""
        order = _shuffled((seed, epoch), len(self.lengths))
        return order[np.argsort(self._bucket[order], kind="stable")], _shuffled((epoch,), self.batches)

    def eval_rows(self) -> Iterator[tuple[Int64[np.ndarray, " B"], Any]]:
        """Every row once, short ones first."""
        order = np.argsort(self._bucket, kind="stable")
        return (self._cut(order, place) for place in range(self.batches))

    def padding_share(self) -> float:
        """Of an epoch's tokens, rows that only fill a batch left out."""
        padded = sum(length * int((rows >= 0).sum()) for rows, length in self.eval_rows())
        return 1 - int(self.lengths.sum()) / padded

    def _cut(self, order: np.ndarray, place: int) -> tuple[np.ndarray, Any]:
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        return np.pad(rows, (0, self.batch_size - len(rows)), constant_values=-1), self._lengths_of(rows)

    def _lengths_of(self, rows: np.ndarray) -> Any:
        return int(self.buckets[self._bucket[rows].max()])


class PairBuckets(LengthBuckets):
    """As LengthBuckets, for rows of two texts [N, 2] that are padded apart, to at most `most` pairs of lengths: the
    first texts to a third of them, and in each of these buckets the second texts to three. Of the second text one
    token less is read, or predicted, than there are: that number is the multiple of `multiple`."""

    def __init__(self, lengths: Int64[np.ndarray, "N 2"], batch_size: int, most: int = 12, multiple: int = 1):
        first = LengthBuckets(lengths[:, 0], batch_size, max(1, most // 3), multiple)
        self.lengths, self.batch_size, self.batches = lengths, batch_size, first.batches
        order = np.lexsort((lengths[:, 1], first._bucket))  # each bucket holds whole batches, and so do its parts:
        ends = np.minimum((np.arange(len(lengths)) // batch_size + 1) * batch_size, len(lengths))
        needed = np.empty((len(lengths), 2), np.int64)
        needed[:, 0] = first.buckets[first._bucket]
        needed[order, 1] = -(-(lengths[order[ends - 1], 1] - 1) // multiple) * multiple + 1
        for number in range(len(first.buckets)):
            inside = first._bucket == number
            second = bucket_lengths(needed[inside, 1], min(3, most))
            needed[inside, 1] = second[np.searchsorted(second, needed[inside, 1])]
        self.buckets, self._bucket = np.unique(needed, axis=0, return_inverse=True)
        self._epoch = functools.lru_cache(maxsize=2)(self._order_of)

    def padding_share(self) -> float:
        return 1 - int(self.lengths.sum()) / int(self.buckets[self._bucket].sum())

    def _lengths_of(self, rows: np.ndarray) -> tuple[int, int]:
        first, second = self.buckets[self._bucket[rows]].max(axis=0)
        return int(first), int(second)
