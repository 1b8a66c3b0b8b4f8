"""Scaled dot-product attention, multi-head attention to the same text and to another, and what decoding keeps of it."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from electrax.models.dropout import Seed, dropout
from electrax.models.linear import Linear
from electrax.models.products import activation_dtype, product

Implementation = Literal["plain", "xla", "cudnn", "fused"]
# what a GPU alone has, and in bfloat16 alone, with the widths of a head that it takes
GPU_ATTENTION: dict[Implementation, tuple[str, Callable[[int], bool]]] = {
    "cudnn": ("a multiple of 8", lambda width: width % 8 == 0),
    "fused": ("16 or a larger power of two", lambda width: width >= 16 and width & (width - 1) == 0),
}
Mask = Bool[Array, "B 1 Q L"]  # True = attend; Q is 1 when every query of a row sees the same keys
MemoryMask = Bool[Array, "B 1 1 S"]


class KeyValues(NamedTuple):
    """What a layer's attention reads: the keys and values of the tokens of a text, or of those decoded so far."""

    keys: Float[Array, "B L H K"]
    values: Float[Array, "B L H K"]


def dot_product_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    mask: Mask,
    *,
    implementation: Implementation = "plain",
    dropout_rate: float = 0.0,
    seed: Seed | None = None,
    dtype: DTypeLike = jnp.float32,
    queries: Any = None,  # a number, or in an export a symbol
) -> Float[Array, "B T H K"]:
    """softmax(q kᵀ / √K + mask) v, with the softmax in float32 and the products in `dtype`.

    A masked key gets a weight of exactly 0 (the reference adds -10000, which underflows to the same 0). A query that
    may attend to nothing returns an unspecified finite value. Dropout on the weights takes the plain path, as
    does what is `fused` in SelfAttention. It is that of `queries`, of which q may hold the first T alone.
    """
    # cuDNN's gradient under a mask wants even lengths
    is_odd = implementation == "cudnn" and seed is not None and (q.shape[1] % 2 or k.shape[1] % 2)
    if implementation in ("xla", "cudnn") and (seed is None or dropout_rate == 0.0) and not is_odd:
        full = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))  # cuDNN wants real query and key axes
        operands = (x.astype(dtype) for x in (q, k, v))
        mixed = jax.nn.dot_product_attention(*operands, mask=full, implementation=implementation)
        return mixed.astype(activation_dtype(dtype))
    row = q.shape[2], queries or q.shape[1], k.shape[1]
    weights = dropout(attention_weights(q, k, mask, dtype), dropout_rate, seed, row)
    return jnp.moveaxis(product("bhtl,bhlk->bhtk", weights, jnp.moveaxis(v, 2, 1), dtype), 1, 2)


def attention_weights(
    q: Float[Array, "B T H K"], k: Float[Array, "B L H K"], mask: Mask, dtype: DTypeLike = jnp.float32
) -> Float[Array, "B H T L"]:
    """softmax(q kᵀ / √K + mask) in float32: what each query takes of each key."""
    # heads first, keys upright: from [B, L, H, K] as it is XLA's products on a CPU take longer
    scores = product("bhtk,bhkl->bhtl", jnp.moveaxis(q, 2, 1), k.transpose(0, 2, 3, 1), dtype, jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


def rotate(x: Float[Array, "B L H K"], positions: Int[Array, "B L"]) -> Float[Array, "B L H K"]:
    """Rotary position embedding (Su et al. 2021, RoFormer), base 10000, halves of K paired."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None] * frequency[None, None, None]
    sin, cos = jnp.sin(angle).astype(x.dtype), jnp.cos(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused product for queries, keys and values: [B, T, D] -> [B, T, D].

    With a `cache` of L places the T tokens are those at the places from `start` on: their keys and values are written
    there, and they read all L places as `mask` allows. `fused` is for training: it applies where there is a `seed`.
    With `first` there are results for so many tokens alone, the first ones.
    """

    heads: int
    rotary: bool = False
    qk_norm: bool = False
    use_bias: bool = True
    dropout_rate: float = 0.0
    implementation: Implementation = "plain"
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    output_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask,
        positions: Int[Array, "B T"],
        seed: Seed | None = None,
        cache: KeyValues | None = None,
        start: Int[Array, ""] | None = None,
        first: int | None = None,
    ) -> tuple[Float[Array, "B N D"], KeyValues | None]:
        width = x.shape[-1]
        linear = functools.partial(Linear, use_bias=self.use_bias, dtype=self.dtype)
        # heads come first, so that a mesh can divide them while queries, keys and values stay one product
        qkv = linear((self.heads, 3, width // self.heads), kernel_init=self.kernel_init, name="qkv")(x)
        output = linear(width, inputs=2, kernel_init=self.output_init, name="output")
        q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        if self.qk_norm:
            q = nn.RMSNorm(dtype=activation_dtype(self.dtype), name="query_norm")(q)
            k = nn.RMSNorm(dtype=activation_dtype(self.dtype), name="key_norm")(k)
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        if self.implementation == "fused" and seed is not None and cache is None and first is None:
            from electrax.models import fused_attention  # its library takes half a second to import

            if fused_attention.fits(q.shape[1], q.shape[3]):
                qkv = jnp.stack([q, k, v], axis=3) if self.qk_norm or self.rotary else qkv
                return output(fused_attention.fused_attention(qkv, mask, seed, self.dropout_rate)), None
        if cache is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            cache = KeyValues(write(cache.keys, k), write(cache.values, v))
            k, v = cache
        # weights are drawn for all layers at once, which cuDNN's call does not allow
        implementation = "plain" if self.is_initializing() else self.implementation
        choices = {"implementation": implementation, "dropout_rate": self.dropout_rate, "dtype": self.dtype}
        queries = q.shape[1]
        mixed = dot_product_attention(q[:, :first], k, v, mask[:, :, :first], seed=seed, queries=queries, **choices)
        return output(mixed), cache


class CrossAttention(nn.Module):
    """Multi-head attention of one text to another, [B, T, D] and its `memory` [B, S, D] -> [B, T, D]. The memory may be
    given as its keys and values, which are the same at every step of decoding. Who asks for the collection `attended`
    gets the weights, the heads' mean, [B, T, S]."""

    width: int
    heads: int
    use_bias: bool = True
    dropout_rate: float = 0.0
    implementation: Implementation = "plain"
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    output_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    def setup(self):
        linear = functools.partial(Linear, use_bias=self.use_bias, dtype=self.dtype)
        each = (self.heads, self.width // self.heads)
        self.query = linear(each, kernel_init=self.kernel_init)
        self.key_value = linear((self.heads, 2, self.width // self.heads), kernel_init=self.kernel_init)
        self.output = linear(self.width, inputs=2, kernel_init=self.output_init)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S D"] | KeyValues,
        mask: MemoryMask,
        seed: Seed | None = None,
    ) -> Float[Array, "B T D"]:
        memory, query = memory if isinstance(memory, KeyValues) else self.project(memory), self.query(x)
        if self.is_mutable_collection("attended") and not self.is_initializing():
            self.sow("attended", "weights", jnp.mean(attention_weights(query, memory.keys, mask, self.dtype), axis=1))
        choices = {"implementation": self.implementation, "dropout_rate": self.dropout_rate, "dtype": self.dtype}
        mixed = dot_product_attention(query, *memory, mask, seed=seed, **choices)
        return self.output(mixed)

    def project(self, memory: Float[Array, "B S D"]) -> KeyValues:
        """The memory's keys and values."""
        both = self.key_value(memory)
        return KeyValues(both[:, :, :, 0], both[:, :, :, 1])
