"""Rows of a table by number, with a gradient that does not add thousands of times to one row."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LookupGradient = Literal["auto", "scatter", "summed"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table: Float[Array, "V E"], ids: Int[Array, "B L"], gradient: LookupGradient = "auto"
) -> Float[Array, "B L E"]:
    """table[ids]. The table's gradient is a `scatter` of all B x L additions, or of those `summed` within a row first,
    so that a row of a batch adds to each row of the table once. auto: summed on a CUDA device.

    There additions to one row wait for each other, and [MASK] alone is a seventh of the generator's tokens.
    """
    return table[ids]


def _forward(table, ids, gradient):
    return table[ids], (ids, table.shape, jnp.zeros((), table.dtype))


def _backward(gradient, kept, slope):
    ids, shape, like = kept
    ways = {"scatter": _scatter, "summed": _scatter_sums}
    if gradient == "auto":
        grad = jax.lax.platform_dependent(ids, slope, cuda=_scatter_sums(shape), default=_scatter(shape))
    else:
        grad = ways[gradient](shape)(ids, slope)
    return grad.astype(like.dtype), None


lookup.defvjp(_forward, _backward)


def _scatter(shape: tuple[int, int]):
    return lambda ids, slope: jnp.zeros(shape, slope.dtype).at[ids].add(slope)


def _scatter_sums(shape: tuple[int, int]):
    def scatter(ids, slope):
        order = jnp.argsort(ids, axis=1)
        ids, slope = jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(slope, order[..., None], axis=1)
        differs = ids[:, 1:] != ids[:, :-1]
        edge = jnp.ones_like(ids[:, :1], bool)
        first, last = jnp.concatenate([edge, differs], axis=1), jnp.concatenate([differs, edge], axis=1)

        def add(a, b):
            (starts_a, sum_a), (starts_b, sum_b) = a, b
            return starts_a | starts_b, jnp.where(starts_b, sum_b, sum_a + sum_b)

        # the sum of all that came since the first of equal ids, which is complete at the last of them
        _, total = jax.lax.associative_scan(add, (first[..., None], slope), axis=1)
        return jnp.zeros(shape, slope.dtype).at[jnp.where(last, ids, shape[0])].add(total, mode="drop")

    return scatter
