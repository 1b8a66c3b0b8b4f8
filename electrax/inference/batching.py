"""Texts of mixed lengths in few shapes with little padding, on all cores."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, Int64

from electrax.config import UserError
from electrax.data.encode import cores

log = logging.getLogger("electrax")
# tokens a row is padded to on a CPU; beyond: multiples of 512
LADDER = (*range(8, 128, 8), *range(128, 256, 32), *range(256, 513, 64))
ACCELERATOR_LADDER = (32, 64, 96, 128, 192, 256, 384, 512)  # a program takes an accelerator longer to compile
TOKENS = 512  # of a large batch: on one core its activations stay in the cache
ACCELERATOR_TOKENS = 8192
WIDE = {"xla_cpu_prefer_vector_width": 512}  # bits, where the processor has them; XLA's own choice is 256
PASS = 32  # tokens that would take as long as what a batch of any size costs
_chosen_tokens = 0


def batch_tokens() -> int:
    """Of a large batch in this process: as chosen, or what suits the machine."""
    return _chosen_tokens or (TOKENS if jax.default_backend() == "cpu" else ACCELERATOR_TOKENS)


def use_batch_tokens(tokens: int) -> None:
    """Lets every model of this process take so many tokens in a large batch, padding counted; 0: what suits the
    machine. No result depends on it. Raises UserError where it is negative."""
    global _chosen_tokens
    if tokens < 0:
        raise UserError(f"batch_tokens must not be negative, but is {tokens}")
    _chosen_tokens = tokens


def at_a_time() -> int:
    """Batches: on a CPU one a core, as cores that share the small products of one wait for each other; elsewhere one
    runs while the next is put together."""
    return cores() if jax.default_backend() == "cpu" else 2


def ladder() -> tuple[int, ...]:
    """The lengths that rows are padded to on this machine."""
    return LADDER if jax.default_backend() == "cpu" else ACCELERATOR_LADDER


def padded_length(length: int) -> int:
    return next((step for step in ladder() if length <= step), -(-length // LADDER[-1]) * LADDER[-1])


def row_counts(length: int, tokens: int) -> list[int]:
    """The sizes of batches of rows padded to `length`: one row, a quarter of `tokens` at most, `tokens` or two rows."""
    return sorted({1, max(1, tokens // 4 // length), max(2, tokens // length)})


def by_length(
    lengths: Sequence[int], tokens: int | None = None, streams: int | None = None
) -> Iterator[tuple[Int64[np.ndarray, " B"], int]]:
    """(row numbers, padded length) of batches that hold every row once, long rows first; -1 fills a batch.

    Of all ways to cut the rows, in order of length, into batches of the sizes of `row_counts`, the one with the least
    tokens, padding and PASS a batch included. Too few rows for a large batch in each of `streams` come in smaller ones.
    """
    tokens, streams = tokens or batch_tokens(), streams or at_a_time()
    order = np.argsort(lengths, kind="stable")[::-1].astype(np.int64)
    padded = [padded_length(lengths[row]) for row in order]
    large = sum(padded) >= streams * tokens
    sizes = {length: row_counts(length, tokens)[: None if large else -1] for length in set(padded)}
    # of the rows from a place on: the least tokens, and the size of the first batch
    least, choice = [0] * (len(order) + 1), [0] * len(order)
    for place in reversed(range(len(order))):
        length = padded[place]
        least[place], choice[place] = min(
            (least[min(place + size, len(order))] + size * length + PASS, size) for size in sizes[length]
        )
    place = 0
    while place < len(order):
        rows = order[place : place + choice[place]]
        yield np.pad(rows, (0, choice[place] - len(rows)), constant_values=-1), padded[place]
        place += choice[place]


def pad(
    rows: Sequence[Sequence[int]], numbers: Int64[np.ndarray, " B"], length: int, fill: int
) -> Int[np.ndarray, "B L"]:
    """Those rows as one array; -1 is a row of `fill`."""
    out = np.full((len(numbers), length), fill, np.int32)
    for place, number in enumerate(numbers):
        if number >= 0:
            out[place, : len(rows[number])] = rows[number]
    return out


def warn_of_cut(cut: Bool[np.ndarray, " N"], most: int) -> None:
    """Says how many rows lost tokens."""
    if cut.any():
        log.warning("%d of %d texts longer than %d tokens were cut", cut.sum(), len(cut), most)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of parameters, then arrays, compiled for inference."""
    return jax.jit(function, compiler_options=WIDE if jax.default_backend() == "cpu" else None)


def run(function: Callable[..., Any], batches: Iterable[Any]) -> Iterator[Any]:
    """What `function` makes of each batch, in their order, several at a time."""
    batches = list(batches)
    if len(batches) < 2:  # nothing to start threads for
        yield from map(function, batches)
        return
    with ThreadPoolExecutor(min(len(batches), at_a_time())) as pool:
        yield from pool.map(function, batches)


def run_by_length(
    forward: Callable[..., Any], columns: Sequence[tuple[Sequence[Sequence[int]], int]], most: int
) -> Iterator[tuple[Int64[np.ndarray, " n"], Any]]:
    """(row numbers, what `forward` makes of those rows: an array or a tree of them), every row once.

    `columns`: for each argument of `forward` the rows and what pads them; all have the same lengths, at most `most`.
    """

    def one(batch: tuple[np.ndarray, int]) -> tuple[np.ndarray, Any]:
        numbers, length = batch
        outputs = forward(*(pad(rows, numbers, min(length, most), fill) for rows, fill in columns))
        return numbers[numbers >= 0], jax.tree.map(lambda leaf: np.asarray(leaf)[numbers >= 0], outputs)

    return run(one, by_length([len(row) for row in columns[0][0]]))


def warm_up(
    forward: Callable[..., Any],
    columns: int,
    most: int,
    longest: int | None,
    shortest: int = 0,
    most_rows: int | None = None,
) -> int:
    """Runs `forward` on every shape that rows of `shortest` to `longest` tokens come in (None, and at most: `most`),
    `most_rows` together at most; returns how many these are. No later call compiles."""
    longest = padded_length(min(max(longest or most, shortest), most))
    steps = [*ladder(), *range(2 * LADDER[-1], longest + 1, LADDER[-1])]
    steps = [n for n in steps if min(shortest, longest) <= n <= longest]
    shapes = {
        (rows, min(length, most))
        for length in steps
        for rows in row_counts(length, batch_tokens())
        if most_rows is None or rows <= most_rows
    }
    ones = ([np.ones(shape, np.int32)] * columns for shape in sorted(shapes))
    return sum(1 for _ in run(lambda arrays: jax.block_until_ready(forward(*arrays)), ones))
