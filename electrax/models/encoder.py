"""The encoder both towers are made of, its embeddings, and the sizes of the paper."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from electrax.models.attention import (
    GPU_ATTENTION,
    CrossAttention,
    Implementation,
    KeyValues,
    Mask,
    MemoryMask,
    SelfAttention,
)
from electrax.models.dropout import Seed, dropout, fold
from electrax.models.linear import Linear
from electrax.models.lookup import LookupGradient, lookup
from electrax.models.products import activation_dtype

MOST_UNROLLED = 12  # layers
VOCABULARY_MULTIPLE = 128  # the word table is padded to it, so that it divides over devices and fills matrix units


Body = Literal["electra", "modern", "gpt2"]


class Traits(NamedTuple):
    """What the bodies differ in."""

    epsilon: float  # of the norms
    pre_norm: bool  # or post-norm
    rotary: bool  # positions, or learned ones
    gated: bool  # feed-forward network
    use_bias: bool  # but of the projection of the embeddings and of heads, which always have one
    tanh_gelu: bool  # approximated, or exact
    bare: bool  # word and position alone are embedded, without a norm, and the LM head is the word table alone


TRAITS: dict[Body, Traits] = {
    # the reference's
    "electra": Traits(1e-12, pre_norm=False, rotary=False, gated=False, use_bias=True, tanh_gelu=False, bare=False),
    "modern": Traits(1e-6, pre_norm=True, rotary=True, gated=True, use_bias=False, tanh_gelu=False, bare=False),
    "gpt2": Traits(1e-5, pre_norm=True, rotary=False, gated=False, use_bias=True, tanh_gelu=True, bare=True),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and numerics of one tower."""

    vocab_size: int
    layers: int = 12
    width: int = 256
    heads: int = 4
    feed_forward: int = 1024
    embedding_width: int = 128
    max_length: int = 512
    body: Body = "electra"
    qk_norm: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    attention: Implementation = "plain"
    residual: Literal["plain", "fused"] = "plain"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    lookup_gradient: LookupGradient = "auto"
    scan_layers: bool | None = None
    remat: bool = False
    remat_keep: Literal["nothing", "products"] = "nothing"

    def __post_init__(self):
        sizes = self.width, self.heads, self.feed_forward, self.embedding_width, self.max_length
        if self.layers < 0 or min(sizes) < 1:
            raise ValueError("layers must not be negative, and widths, heads and max_length at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if not (0 <= self.dropout < 1 and 0 <= self.attention_dropout < 1):
            raise ValueError(
                "dropout and attention_dropout must be at least 0 and below 1, not "
                f"{self.dropout} and {self.attention_dropout}"
            )
        if self.traits.rotary and self.width // self.heads % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.width // self.heads}")
        if self.attention in GPU_ATTENTION:
            (wanted, fits), width = GPU_ATTENTION[self.attention], self.width // self.heads
            if self.compute_dtype != "bfloat16" or not fits(width):
                raise ValueError(
                    f"attention {self.attention} needs compute_dtype bfloat16 and heads whose width is {wanted}, not "
                    f"{self.compute_dtype} and {width}"
                )
        if self.residual == "fused" and self.traits.pre_norm:
            raise ValueError(f"residual fused needs a norm after each sum, which the body {self.body} has not")
        if self.traits.bare and self.embedding_width != self.width:
            raise ValueError(f"the body {self.body} has embeddings as wide as its states, {self.width}")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def traits(self) -> Traits:
        return TRAITS[self.body]

    @property
    def scanned(self) -> bool:
        """Whether one layer is compiled for all; by default for deep towers, which take long to compile."""
        return self.layers > MOST_UNROLLED if self.scan_layers is None else self.scan_layers

    @property
    def dtype(self) -> jnp.dtype:
        """Of matrix products."""
        return jnp.dtype(self.compute_dtype)

    @property
    def activation_dtype(self) -> jnp.dtype:
        """Of activations."""
        return activation_dtype(self.dtype)

    def kernel_init(self, residual: bool = False) -> nn.initializers.Initializer:
        """Normal σ = .02 cut at 2σ without variance correction (real σ ≈ .0176). modern: variance 1/fan-in, with the
        layers that write into the residual stream scaled down by √(2N)."""
        if self.body != "modern":
            return truncated_normal
        return nn.initializers.variance_scaling(
            1 / (2 * self.layers) if residual else 1.0, "fan_in", "truncated_normal"
        )

    def norm(self, name: str | None = None) -> nn.LayerNorm:
        """LayerNorm with float32 statistics."""
        t, dtype = self.traits, self.activation_dtype
        return nn.LayerNorm(t.epsilon, dtype=dtype, use_bias=t.use_bias, use_fast_variance=False, name=name)

    def gelu(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return nn.gelu(x, approximate=True) if self.traits.tanh_gelu else gelu(x)


def truncated_normal(key, shape, dtype=jnp.float32) -> jax.Array:
    """Normal of σ = .02 cut at ±2σ, as the reference initialises everything but projections and output layers."""
    return 0.02 * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Φ(x) by the error function, not the tanh approximation."""
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    cdf = _normal_cdf(x)
    slope = cdf + x * jnp.exp(-0.5 * x * x) * np.sqrt(0.5 / np.pi).astype(x.dtype)
    return x * cdf, slope * t


class Embeddings(nn.Module):
    """Word + position + type embeddings and their LayerNorm: ids [B, L] -> [B, L, E]. Both towers share one set. Rotary
    positions are in the attention instead; the bare ones of GPT-2 have neither types nor a norm."""

    config: EncoderConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.embedding_width**-0.5) if c.body == "modern" else truncated_normal
        self.word = self.param("word", init, (c.padded_vocab_size, c.embedding_width))
        if not c.traits.rotary:
            self.position = self.param("position", init, (c.max_length, c.embedding_width))
        if not c.traits.bare:
            self.type = self.param("type", init, (2, c.embedding_width))
            self.norm = c.norm()

    def __call__(
        self, ids: Int[Array, "B L"], types: Int[Array, "B L"] | None = None, positions: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L E"]:
        """`types` default to 0 and `positions` to 0 … L-1."""
        traits = self.config.traits
        take = functools.partial(lookup, gradient=self.config.lookup_gradient)
        x = take(self.word, ids)
        if not traits.rotary:
            x = x + (self.position[None, : ids.shape[1]] if positions is None else take(self.position, positions))
        if traits.bare:
            return x
        # two rows by arithmetic: a gather would give the gradient a scatter onto two rows
        first, second = self.type[None, None, 0], self.type[None, None, 1]
        x = x + first + (0 if types is None else types[..., None] * (second - first))
        return self.norm(x)


def _attention_options(c: EncoderConfig) -> dict[str, Any]:
    return {
        "heads": c.heads,
        "use_bias": c.traits.use_bias,
        "dropout_rate": c.attention_dropout,
        "implementation": c.attention,
        "dtype": c.dtype,
        "kernel_init": c.kernel_init(),
        "output_init": c.kernel_init(residual=True),
    }


def project_memory(c: EncoderConfig, layers: Mapping[str, Any], memory: Float[Array, "B S D"]) -> list[KeyValues]:
    """The keys and values that each of a decoder's layers, given by their parameters, reads of the memory."""
    attention = CrossAttention(c.width, **_attention_options(c))
    each = ({"params": layers[f"layer_{i}"]["cross_attention"]} for i in range(c.layers))
    return [attention.apply(params, memory, method="project") for params in each]


class Block(nn.Module):
    """One Transformer layer, [B, T, D] -> [B, T, D]: self-attention, with a `memory` attention to that, and a
    feed-forward network. `cache`, `start` and `first` as in SelfAttention; the result comes with the cache."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask,
        positions: Int[Array, "B T"],
        seed: Seed | None = None,
        memory: Float[Array, "B S D"] | KeyValues | None = None,
        memory_mask: MemoryMask | None = None,
        cache: KeyValues | None = None,
        start: Int[Array, ""] | None = None,
        first: int | None = None,
    ) -> tuple[Float[Array, "B N D"], KeyValues | None]:
        c = self.config
        attention = SelfAttention(**_attention_options(c), rotary=c.traits.rotary, qk_norm=c.qk_norm, name="attention")

        def dense(features: int, name: str, residual: bool = False):
            init = c.kernel_init(residual)
            return Linear(features, use_bias=c.traits.use_bias, dtype=c.dtype, kernel_init=init, name=name)

        def feed_forward(h):
            up = dense(c.feed_forward, "up")(h)
            h = c.gelu(dense(c.feed_forward, "gate")(h)) * up if c.traits.gated else c.gelu(up)
            return dense(c.width, "down", residual=True)(h)

        def attend(h):
            nonlocal cache
            h, cache = attention(h, mask, positions, fold(seed, 0), cache, start, first)
            return h

        def add(x, part, norm: str, site: int):
            """x + part(x), normalised before the part (pre-norm) or after the sum (post-norm)."""
            own = fold(seed, site)
            if c.traits.pre_norm:
                return x[:, :first] + dropout(part(c.norm(norm)(x)), c.dropout, own)
            if c.residual == "fused" and own is not None and first is None:
                from electrax.models import fused_norm  # its library takes half a second to import

                if fused_norm.fits(*x.shape[1:]):
                    return fused_norm.NormOfSum(c.traits.epsilon, c.dropout, name=norm)(x, part(x), own)
            return c.norm(norm)(x[:, :first] + dropout(part(x), c.dropout, own))

        x = add(x, attend, "attention_norm", 1)
        if memory is not None:
            cross = CrossAttention(c.width, **_attention_options(c), name="cross_attention")
            x = add(x, lambda h: cross(h, memory, memory_mask, fold(seed, 3)), "cross_attention_norm", 4)
        return add(x, feed_forward, "output_norm", 2), cache


class Encoder(nn.Module):
    """Embedded text [B, T, E] -> hidden states [B, T, D]: a projection where E differs from D, then the layers.

    A decoder is one too: with a mask that looks back, and perhaps a `memory` to read beside, the hidden states of
    another text or in `memory` one KeyValues a layer. With the `cache` of every layer, and `start` as in SelfAttention,
    it returns (hidden states, cache). Who asks for the collection `attended` gets the last layer's attention to the
    memory, `weights` [B, T, S]. Who wants the hidden states of the `first` tokens alone does not pay for the others in
    the last layer.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        embedded: Float[Array, "B T E"],
        mask: Mask,
        positions: Int[Array, "B T"] | None = None,
        seed: Seed | None = None,
        memory: Float[Array, "B S D"] | list[KeyValues] | None = None,
        memory_mask: MemoryMask | None = None,
        cache: list[KeyValues] | None = None,
        start: Int[Array, ""] | None = None,
        first: int | None = None,
    ) -> Float[Array, "B N D"] | tuple[Float[Array, "B N D"], list[KeyValues]]:
        """`positions` (default 0 … T-1) matter to rotary attention only. Without `seed` nothing is dropped."""
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(embedded.shape[1]), embedded.shape[:2])
        x = dropout(embedded.astype(c.activation_dtype), c.dropout, fold(seed, c.layers))
        if c.embedding_width != c.width:
            # the reference leaves this one layer to TensorFlow's default initialiser
            init = nn.initializers.glorot_uniform()
            x = Linear(c.width, dtype=c.dtype, kernel_init=init, name="embeddings_project")(x)
        block = Block(c)
        memories = memory if isinstance(memory, list) else [None] * c.layers  # of each layer
        memory = None if isinstance(memory, list) else memory
        layers = self._layers(lambda key: block.init(key, x, mask, positions, None, memory, memory_mask)["params"])
        watched = ["attended"] if self.is_mutable_collection("attended") and not self.is_initializing() else False

        def apply(x, layer, first=None):
            params, seed, own, cache = layer
            own = memory if own is None else own
            given = x, mask, positions, seed, own, memory_mask, cache, start, first
            found = block.apply({"params": params}, *given, mutable=watched)
            (x, cache), seen = found if watched else (found, None)
            return x, (cache, seen)

        def traced(apply):
            if c.remat:
                keep = jax.checkpoint_policies
                keep = keep.nothing_saveable if c.remat_keep == "nothing" else keep.dots_with_no_batch_dims_saveable
                apply = jax.checkpoint(apply, prevent_cse=not c.scanned, policy=keep)
            return jax.jit(apply)  # traced once for all layers; the compiler takes the call apart again

        seeds = [fold(seed, i) for i in range(c.layers)]
        each = list(zip(layers, seeds, memories, cache or [None] * c.layers, strict=True))
        last, kept = [each.pop()] if first else [], []
        apply_all = traced(apply)
        if c.scanned and each:
            x, written = jax.lax.scan(apply_all, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
            kept = [jax.tree.map(lambda leaf, i=i: leaf[i], written) for i in range(len(each))]
        for layer in [] if c.scanned else each:
            x, written = apply_all(x, layer)
            kept.append(written)
        for layer in last:
            x, written = traced(functools.partial(apply, first=first))(x, layer)
            kept.append(written)
        if watched:
            self.sow("attended", "weights", kept[-1][1]["attended"]["cross_attention"]["weights"][0])
        x = c.norm("final_norm")(x) if c.traits.pre_norm else x
        return x if cache is None else (x, [cache for cache, _ in kept])

    def _layers(self, draw: Callable[[Key[Array, ""]], Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The parameters of each layer; where there are none yet, `draw` makes one's of a key."""
        names = [f"layer_{i}" for i in range(self.config.layers)]
        if not self.is_initializing():  # `param` would trace each layer's initialisation again, to check its shapes
            return [self.get_variable("params", name) for name in names]
        # all at once: the initialisers of one layer are compiled, not those of every layer
        drawn = jax.vmap(draw)(jax.random.split(self.make_rng("params"), len(names)))
        return [
            self.param(name, lambda _, i=i: jax.tree.map(lambda leaf: leaf[i], drawn)) for i, name in enumerate(names)
        ]
