"""Dropout whose mask is a function of (row seed, place in the row) and of nothing else.

A row's mask does not depend on which other rows share its batch, so micro-batches, devices and processes can cut a
batch anywhere and drop the same units. The counter-based hash also costs less than threefry, as it fuses.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

Seed = UInt32[Array, "B"]


def _mix(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser "lowbias32" (C. Wellons, hash-prospector): a bijection with low avalanche bias."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def fold(seed: Seed | None, site: int) -> Seed | None:
    """Seeds of a sub-site (a layer, a dropout inside it); None, the deterministic mode, stays None."""
    return None if seed is None else _mix(seed + jnp.uint32((site + 1) * 0x9E3779B9 % 2**32))


def dropout(
    x: Float[Array, "B ..."], rate: float, seed: Seed | None, row: tuple | None = None
) -> Float[Array, "B ..."]:
    """Zeroes each unit with probability `rate` and scales the rest by 1 / (1 - rate); identity if `seed` is None.

    `row` is the shape of a whole row where x holds the first units along its axes alone: these are dropped as there.
    """
    if seed is None or rate == 0.0:
        return x
    row = row or x.shape[1:]
    place = jnp.arange(math.prod(row), dtype=jnp.uint32).reshape(1, *row)
    place = place[:, *(slice(size) for size in x.shape[1:])]
    keep = is_kept(seed.reshape(-1, *[1] * (x.ndim - 1)), place, rate)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


def is_kept(seed: UInt32[Array, "..."], place: UInt32[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """Whether dropout leaves the unit at a place, counted through its row."""
    return _mix(seed + place * jnp.uint32(0x9E3779B9)) >= jnp.uint32(round(rate * 2**32))
