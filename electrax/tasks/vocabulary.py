"""Logits over a large vocabulary, without those of all rows at once."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from electrax.tasks.base import Batch

MOST_LOGITS = 2**28  # of a device, held at once: 1 GiB


def devices_of_tensors() -> int:
    """How many devices the tensors of the code that is being traced are divided over: all, or in a shard_map over rows
    those that share its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return jax.device_count()
    return math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


def rows_at_once(rows: int, places: int, vocabulary: int, most: int = 0) -> int:
    """The largest divisor of `rows` that is at most `most`, or where that is 0 holds no more logits than MOST_LOGITS a
    device, with those of `vocabulary` entries at `places` of a row."""
    most = most or MOST_LOGITS * devices_of_tensors() // (places * vocabulary)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, most))


def by_rows(function: Callable[[Batch], Batch], rows: Batch, size: int) -> Batch:
    """`function` of all rows, taken `size` at a time, and computed again for the gradient where that is not all.

    Chunk j takes every n-th row from the j-th on, so that a batch divided over devices stays where it is.
    """
    chunks = jax.tree.leaves(rows)[0].shape[0] // size
    if chunks == 1:
        return function(rows)
    cut = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size, chunks, *x.shape[1:]), 0, 1), rows)
    found = jax.lax.map(jax.checkpoint(function), cut)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(size * chunks, *x.shape[2:]), found)


def _entries(logits: Float[Array, "B N V"]) -> Int[Array, "1 1 V"]:
    return jnp.arange(logits.shape[-1])[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits: Float[Array, "B N V"], token: Int[Array, "B N"], smoothing: float = 0.0, tokens: int = 0
) -> Float[Array, "B N"]:
    """-log softmax(logits) at the token, or with the share `smoothing` of the target spread evenly over the first
    `tokens` entries (Szegedy et al. 2016, section 7). The gradient of the logits, softmax less the target, is made in
    one pass over them; left to JAX it would be three, one of them a scatter."""
    return _cross_entropy(logits, token, smoothing, tokens)[0]


def _cross_entropy(logits, token, smoothing, tokens):
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    wanted = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    if smoothing:
        # times 0 or 1: of a slice, or a choice, XLA makes a copy on a CPU
        total = jnp.sum(logits * (_entries(logits) < tokens), axis=-1)
        wanted = (1 - smoothing) * wanted + smoothing / tokens * total
    return normalizer - wanted, (logits, token, normalizer)


def _cross_entropy_gradient(smoothing, tokens, kept, slope):
    logits, token, normalizer = kept
    target = _entries(logits) == token[..., None]
    if smoothing:
        target = (1 - smoothing) * target + smoothing / tokens * (_entries(logits) < tokens)
    return slope[..., None] * (jnp.exp(logits - normalizer[..., None]) - target), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def is_largest(logits: Float[Array, "B N V"], token: Int[Array, "B N"]) -> Bool[Array, "B N"]:
    """Whether no logit is above the token's: as an arg max says, but for ties, at a fraction of its cost on a CPU."""
    return jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] >= jnp.max(logits, axis=-1)
