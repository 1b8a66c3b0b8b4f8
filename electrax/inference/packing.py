"""Several short texts in one row, whose attention stops at their borders."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from electrax.inference.batching import padded_length, run_by_length

SHORTEST_ROW = 128  # tokens
MOST_TEXTS = 16  # of a row


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of the texts that share each row of `length` tokens. Longest first, each text goes into the row with the
    least room that it fits into, or opens one."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # by their room
    for number in np.argsort(lengths, kind="stable")[::-1].tolist():
        need = lengths[number]
        room = next((room for room in range(need, length + 1) if open_rows[room]), length)
        if open_rows[room]:
            place = open_rows[room].pop()
        else:
            place = len(rows)
            rows.append([])
        rows[place].append(number)
        if len(rows[place]) < MOST_TEXTS:
            open_rows[room - need].append(place)
    return rows


def run_packed(
    forward: Callable[..., Any], texts: Sequence[Sequence[int]], pad_id: int, most: int
) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """(a text's number, which of its row's texts it is, its first place there, what `forward` makes of that row), every
    text once. `forward` takes token ids, the text of each, 1, 2, 3 … and 0 for padding, and its place in the text, all
    [B, L]."""
    length = min(most, padded_length(max(SHORTEST_ROW, *map(len, texts))))
    rows = pack([len(text) for text in texts], length)
    ids = np.full((len(rows), length), pad_id, np.int32)
    documents, positions = np.zeros_like(ids), np.zeros_like(ids)
    first = [0] * len(texts)  # place of each text in its row
    for row, numbers in enumerate(rows):
        start = 0
        for which, number in enumerate(numbers, 1):
            first[number], end = start, start + len(texts[number])
            ids[row, start:end], documents[row, start:end] = texts[number], which
            positions[row, start:end] = np.arange(end - start)
            start = end
    columns = [(column.tolist(), fill) for column, fill in ((ids, pad_id), (documents, 0), (positions, 0))]
    for some, outputs in run_by_length(forward, columns, most):
        for row, output in zip(some.tolist(), outputs, strict=True):
            for which, number in enumerate(rows[row]):
                yield number, which, first[number], output


def pooled(
    hidden: Float[Array, "B L D"], documents: Int[Array, "B L"], positions: Int[Array, "B L"], pooling: str
) -> Float[Array, "B T D"]:
    """One vector for each of a row's MOST_TEXTS texts: the mean of its tokens', or its first token's ("cls")."""
    member = jax.nn.one_hot(documents - 1, MOST_TEXTS, axis=1)  # [B, T, L]
    if pooling == "cls":
        weights = member * (positions == 0)[:, None]
    else:
        weights = member / jnp.maximum(jnp.sum(member, axis=-1, keepdims=True), 1.0)
    return jnp.einsum("btl,bld->btd", weights, hidden)
