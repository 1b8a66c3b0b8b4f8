"""Which rows make up a batch: pure functions of (seed, step), with no iterator to save and no O(size) memory."""

import functools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

ROUNDS = 3  # of both halves
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
