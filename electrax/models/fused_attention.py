"""Self-attention as one GPU kernel each way, so that neither scores nor weights are ever in the device's memory.

The algorithm is FlashAttention-2's (Dao 2023): the softmax is kept up block by block of keys, and the backward pass
computes it again. The dropout of the weights is that of models/dropout.py, so that the result is `plain`'s but for
rounding. Queries, keys and values are read from their common product as it is, and their gradient is written likewise.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

from electrax.models.dropout import Seed, is_kept

SMALLEST = 16  # the least length, and width of a head, that a matrix unit takes
LARGEST = 128  # tokens of a block: with more the registers of an H100 do not suffice
NEVER = -1e30  # a masked score; finite, so that a query that sees nothing gives finite values

QKV = Float[Array, "B L H 3 K"]
Mask = Bool[Array, "B 1 Q L"]  # True = attend; Q is 1 or L


def fits(length: int, width: int) -> bool:
    """Whether the kernels take rows of that length, with heads of that width."""
    return length % SMALLEST == 0 and width >= SMALLEST and width & (width - 1) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_attention(qkv: QKV, mask: Mask, seed: Seed, dropout_rate: float) -> Float[Array, "B L H K"]:
    """dropout(softmax(q kᵀ / √K + mask)) v of `qkv`, which holds q, k and v of each head; `fits` must be true.

    Products of operands as they are, summed in float32; the softmax is in float32. On a CPU the kernels are
    interpreted, which is slow.
    """
    return _forward(qkv, mask, seed, dropout_rate)[0]


def _forward(qkv, mask, seed, rate):
    batch, length, heads, _, width = qkv.shape
    out, log_sum = pl.pallas_call(
        functools.partial(_forward_kernel, rate=rate, heads=heads, block=_block(length)),
        in_specs=_input_specs(qkv, mask),
        out_specs=[_rows_spec(length, heads, width), _log_sum_spec(length)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, width), qkv.dtype),
            jax.ShapeDtypeStruct((batch * heads, length), jnp.float32),
        ],
        name="fused_attention",
        **_launch(qkv),
    )(qkv, qkv, qkv, mask[:, 0], seed)
    return out, (qkv, mask, seed, out, log_sum)


def _backward(rate, kept, slope):
    qkv, mask, seed, out, log_sum = kept
    _, length, heads, _, width = qkv.shape
    rows = _rows_spec(length, heads, width)
    gradient = pl.pallas_call(
        functools.partial(_backward_kernel, rate=rate, heads=heads, block=_block(length)),
        in_specs=[*_input_specs(qkv, mask), rows, rows, _log_sum_spec(length)],
        out_specs=pl.BlockSpec((None, length, None, 3, width), lambda i, _: (i // heads, 0, i % heads, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        name="fused_attention_gradient",
        **_launch(qkv),
    )(qkv, qkv, qkv, mask[:, 0], seed, out, slope.astype(qkv.dtype), log_sum)
    return gradient, None, None


fused_attention.defvjp(_forward, _backward)

# -- what a program of the grid (row and head, block) sees: all tokens of its head of its row --------------------------


def _block(length):
    return math.gcd(length, LARGEST)


def _launch(qkv):
    batch, length, heads, *_ = qkv.shape
    block = _block(length)
    return {
        "grid": (batch * heads, length // block),
        "compiler_params": triton.CompilerParams(num_warps=8 if block == LARGEST else 4, num_stages=2),
        "interpret": jax.default_backend() == "cpu",
    }


def _input_specs(qkv, mask):
    """Of queries, keys, values, mask and seed."""
    _, length, heads, _, width = qkv.shape
    return [
        *(
            pl.BlockSpec((None, length, None, None, width), lambda i, _, part=part: (i // heads, 0, i % heads, part, 0))
            for part in range(3)
        ),
        pl.BlockSpec((None, *mask.shape[2:]), lambda i, _: (i // heads, 0, 0)),
        pl.BlockSpec((1,), lambda i, _: (i // heads,)),
    ]


def _rows_spec(length, heads, width):
    return pl.BlockSpec((None, length, None, width), lambda i, _: (i // heads, 0, i % heads, 0))


def _log_sum_spec(length):
    return pl.BlockSpec((None, length), lambda i, _: (i, 0))


# -- the kernels -------------------------------------------------------------------------------------------------------


def _scores(q, k, mask_ref, query, key):
    """Of a block of queries from `query` on with one of keys, in base 2."""
    block = q.shape[0]
    seen = mask_ref[pl.ds(query, block) if mask_ref.shape[0] > 1 else pl.ds(0, 1), pl.ds(key, block)]
    return jnp.where(seen, triton.dot(q, k, trans_b=True) * (q.shape[1] ** -0.5 * math.log2(math.e)), NEVER)


def _dropout(seed_ref, rate, heads, length):
    """What dropout() does to the weights [B, H, L, L], and to their gradient, at this program's head: of (block, first
    query, first key)."""
    seed, first = seed_ref[0], jax.lax.rem(pl.program_id(0), heads) * length

    def dropped(x, query, key):
        if rate == 0.0:
            return x
        row = first + query + jnp.arange(x.shape[0])
        place = row[:, None] * length + key + jnp.arange(x.shape[1])[None]
        return jnp.where(is_kept(seed, place.astype(jnp.uint32), rate), x * (1.0 / (1.0 - rate)), 0.0)

    return dropped


def _forward_kernel(q_ref, k_ref, v_ref, mask_ref, seed_ref, out_ref, log_sum_ref, *, rate, heads, block):
    length, width = q_ref.shape
    query, dropped = pl.program_id(1) * block, _dropout(seed_ref, rate, heads, length)
    queries = pl.ds(query, block)
    q = q_ref[queries, :]

    def add(i, carry):
        mixed, highest, total = carry
        keys = pl.ds(i * block, block)
        scores = _scores(q, k_ref[keys, :], mask_ref, query, i * block)
        new = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(highest - new)
        kept = dropped(weights, query, i * block).astype(v_ref.dtype)
        mixed = mixed * shrink[:, None] + triton.dot(kept, v_ref[keys, :])
        return mixed, new, total * shrink + jnp.sum(weights, axis=1)

    nothing = jnp.zeros((block, width)), jnp.full(block, NEVER), jnp.zeros(block)
    mixed, highest, total = jax.lax.fori_loop(0, length // block, add, nothing)
    out_ref[queries, :] = (mixed / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[queries] = highest + jnp.log2(total)


def _backward_kernel(
    q_ref, k_ref, v_ref, mask_ref, seed_ref, out_ref, slope_ref, log_sum_ref, gradient_ref, *, rate, heads, block
):
    """The gradient of one block of tokens: of its keys and values, from all queries, and of its queries."""
    length, width = q_ref.shape
    dropped, dtype = _dropout(seed_ref, rate, heads, length), gradient_ref.dtype
    own, blocks = pl.program_id(1) * block, length // block

    def weights_and_gradient(query, key):
        """The weights after dropout, the gradient of the scores, and of what these were made the queries, the slope at
        their results, and the keys."""
        queries, keys = pl.ds(query, block), pl.ds(key, block)
        q, slope, k = q_ref[queries, :], slope_ref[queries, :], k_ref[keys, :]
        weights = jnp.exp2(_scores(q, k, mask_ref, query, key) - log_sum_ref[queries][:, None])
        common = jnp.sum(slope.astype(jnp.float32) * out_ref[queries, :].astype(jnp.float32), axis=1)
        through = dropped(triton.dot(slope, v_ref[keys, :], trans_b=True), query, key)
        gradient = weights * (through - common[:, None]) * width**-0.5
        return dropped(weights, query, key).astype(dtype), gradient.astype(dtype), q, slope, k

    def add_to_keys(i, carry):
        of_keys, of_values = carry
        kept, gradient, q, slope, k = weights_and_gradient(i * block, own)
        if blocks == 1:
            gradient_ref[:, 0, :] = triton.dot(gradient, k).astype(dtype)
        return of_keys + triton.dot(gradient, q, trans_a=True), of_values + triton.dot(kept, slope, trans_a=True)

    def add_to_queries(i, total):
        _, gradient, _, _, k = weights_and_gradient(own, i * block)
        return total + triton.dot(gradient, k)

    nothing = jnp.zeros((block, width))
    of_keys, of_values = jax.lax.fori_loop(0, blocks, add_to_keys, (nothing, nothing))
    gradient_ref[pl.ds(own, block), 1, :] = of_keys.astype(dtype)
    gradient_ref[pl.ds(own, block), 2, :] = of_values.astype(dtype)
    if blocks > 1:
        of_queries = jax.lax.fori_loop(0, blocks, add_to_queries, nothing)
        gradient_ref[pl.ds(own, block), 0, :] = of_queries.astype(dtype)
