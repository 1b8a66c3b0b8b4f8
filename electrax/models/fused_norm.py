"""Dropout, residual sum and LayerNorm as one GPU kernel each way, which reads and writes each state once."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from electrax.models.dropout import Seed, is_kept

TOKENS = 64  # of a program
NUMBERS = 4096  # that it has in hand at once


def fits(length: int, width: int) -> bool:
    """Whether the kernels take rows of that length and width."""
    return length % 16 == 0 and width % 16 == 0


class NormOfSum(nn.Module):
    """LayerNorm(x + dropout(part)) with the parameters of a LayerNorm."""

    epsilon: float
    dropout_rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], part: Float[Array, "B L D"], seed: Seed) -> Float[Array, "B L D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return norm_of_sum(x, part, scale, bias, seed, self.dropout_rate, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def norm_of_sum(
    x: Float[Array, "B L D"],
    part: Float[Array, "B L D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    seed: Seed,
    dropout_rate: float,
    epsilon: float,
) -> Float[Array, "B L D"]:
    """LayerNorm(x + dropout(part)), computed in float32; the sum and the result are rounded to the type of x."""
    return _forward(x, part, scale, bias, seed, dropout_rate, epsilon)[0]


def _forward(x, part, scale, bias, seed, rate, epsilon):
    rows, vector = _specs(x.shape)
    out, total = pl.pallas_call(
        functools.partial(_forward_kernel, rate=rate, epsilon=epsilon),
        in_specs=[rows, rows, vector, vector, pl.BlockSpec((1,), lambda i, _: (i,))],
        out_specs=[rows, rows],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        name="fused_norm",
        **_launch(x.shape),
    )(x, part, scale, bias, seed)
    return out, (total, scale, seed)


def _backward(rate, epsilon, kept, slope):
    total, scale, seed = kept
    rows, vector = _specs(total.shape)
    batch, length, width = total.shape
    programs = length // math.gcd(length, TOKENS)
    of_vector = pl.BlockSpec((None, None, width), lambda i, j: (i, j, 0))
    of_x, of_part, of_scale, of_bias = pl.pallas_call(
        functools.partial(_backward_kernel, rate=rate, epsilon=epsilon),
        in_specs=[rows, vector, pl.BlockSpec((1,), lambda i, _: (i,)), rows],
        out_specs=[rows, rows, of_vector, of_vector],
        out_shape=[
            *[jax.ShapeDtypeStruct(total.shape, total.dtype)] * 2,
            *[jax.ShapeDtypeStruct((batch, programs, width), jnp.float32)] * 2,
        ],
        name="fused_norm_gradient",
        **_launch(total.shape),
    )(total, scale, seed, slope)
    return of_x, of_part, jnp.sum(of_scale, axis=(0, 1)), jnp.sum(of_bias, axis=(0, 1)), None


norm_of_sum.defvjp(_forward, _backward)


def _specs(shape):
    """Of what a program sees: some tokens of a row, and a vector that is the same for all."""
    _, length, width = shape
    rows = pl.BlockSpec((None, math.gcd(length, TOKENS), width), lambda i, j: (i, j, 0))
    return rows, pl.BlockSpec((width,), lambda *_: (0,))


def _launch(shape):
    batch, length, _ = shape
    return {
        "grid": (batch, length // math.gcd(length, TOKENS)),
        "compiler_params": triton.CompilerParams(num_warps=4, num_stages=2),
        "interpret": jax.default_backend() == "cpu",
    }


# -- the kernels -------------------------------------------------------------------------------------------------------


def _cut(tokens, width):
    """Tokens that are read at once, and the parts of their width: powers of two, as a GPU's tiles must be."""
    size = width & -width
    most = max(1, NUMBERS // width)
    return math.gcd(tokens, 1 << (most.bit_length() - 1)), [pl.ds(start, size) for start in range(0, width, size)]


def _dropout(seed_ref, rate, tokens, width):
    """What dropout() does to [B, L, D] at this program's tokens: of (block, first token, columns)."""
    seed, own = seed_ref[0], pl.program_id(1) * tokens

    def dropped(x, first, columns):
        if rate == 0.0:
            return x
        place = (own + first + jnp.arange(x.shape[0]))[:, None] * width + columns.start + jnp.arange(x.shape[1])[None]
        return jnp.where(is_kept(seed, place.astype(jnp.uint32), rate), x * (1.0 / (1.0 - rate)), 0.0)

    return dropped


def _mean(parts, width):
    return sum(jnp.sum(part, axis=1) for part in parts)[:, None] / width


def _normalized(parts, width, epsilon):
    """(x - mean) / √(variance + ε), and what was multiplied with."""
    mean = _mean(parts, width)
    centred = [part - mean for part in parts]
    inverse = jax.lax.rsqrt(_mean([jnp.square(part) for part in centred], width) + epsilon)
    return [part * inverse for part in centred], inverse


def _forward_kernel(x_ref, part_ref, scale_ref, bias_ref, seed_ref, out_ref, total_ref, *, rate, epsilon):
    tokens, width = x_ref.shape
    size, columns = _cut(tokens, width)
    dropped = _dropout(seed_ref, rate, tokens, width)

    def one(i, _):
        rows, totals = pl.ds(i * size, size), []
        for column in columns:
            part = dropped(part_ref[rows, column].astype(jnp.float32), i * size, column)
            total = (x_ref[rows, column].astype(jnp.float32) + part).astype(total_ref.dtype)
            total_ref[rows, column] = total
            totals.append(total.astype(jnp.float32))
        for column, normalized in zip(columns, _normalized(totals, width, epsilon)[0], strict=True):
            out = normalized * scale_ref[column][None] + bias_ref[column][None]
            out_ref[rows, column] = out.astype(out_ref.dtype)
        return _

    jax.lax.fori_loop(0, tokens // size, one, 0)


def _backward_kernel(
    total_ref, scale_ref, seed_ref, slope_ref, x_ref, part_ref, of_scale_ref, of_bias_ref, *, rate, epsilon
):
    tokens, width = total_ref.shape
    size, columns = _cut(tokens, width)
    dropped = _dropout(seed_ref, rate, tokens, width)

    def one(i, carry):
        rows = pl.ds(i * size, size)
        totals = [total_ref[rows, column].astype(jnp.float32) for column in columns]
        normalized, inverse = _normalized(totals, width, epsilon)
        slopes = [slope_ref[rows, column].astype(jnp.float32) for column in columns]
        scaled = [slope * scale_ref[column][None] for slope, column in zip(slopes, columns, strict=True)]
        common = _mean(scaled, width)
        along = _mean([a * b for a, b in zip(scaled, normalized, strict=True)], width)
        for column, a, b in zip(columns, scaled, normalized, strict=True):
            gradient = inverse * (a - common - b * along)
            x_ref[rows, column] = gradient.astype(x_ref.dtype)
            part_ref[rows, column] = dropped(gradient, i * size, column).astype(part_ref.dtype)
        of_scale, of_bias = carry
        of_scale = [old + jnp.sum(a * b, axis=0) for old, a, b in zip(of_scale, slopes, normalized, strict=True)]
        return of_scale, [old + jnp.sum(a, axis=0) for old, a in zip(of_bias, slopes, strict=True)]

    nothing = [jnp.zeros(column.size) for column in columns]
    of_scale, of_bias = jax.lax.fori_loop(0, tokens // size, one, (nothing, nothing))
    for column, a, b in zip(columns, of_scale, of_bias, strict=True):
        of_scale_ref[column], of_bias_ref[column] = a, b
