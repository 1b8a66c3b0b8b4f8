"""Logits over a large vocabulary, without those of all rows at once."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from electrax.tasks.base import Batch


def devices_of_tensors() -> int:
    """How many devices the tensors of the code that is being traced are divided over: all, or in a shard_map over rows
    those that share its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return jax.device_count()
    return math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


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


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "B N V"], token: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """-log softmax(logits) at the token. The gradient of the logits, softmax less one at the token, is made in one pass
    over them; left to JAX it would be three, one of them a scatter."""
    return _cross_entropy(logits, token)[0]


def _cross_entropy(logits, token):
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    return normalizer - jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0], (logits, token, normalizer)


def _cross_entropy_gradient(kept, slope):
    logits, token, normalizer = kept
    is_token = jnp.arange(logits.shape[-1])[None, None] == token[..., None]
    return slope[..., None] * (jnp.exp(logits - normalizer[..., None]) - is_token), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def is_largest(logits: Float[Array, "B N V"], token: Int[Array, "B N"]) -> Bool[Array, "B N"]:
    """Whether no logit is above the token's: as an arg max says, but for ties, at a fraction of its cost on a CPU."""
    return jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] >= jnp.max(logits, axis=-1)
