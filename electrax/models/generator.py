"""The generator: a small encoder with a masked-language-model head."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from electrax.models.attention import Mask
from electrax.models.dropout import Seed, fold
from electrax.models.encoder import Encoder, EncoderConfig, gelu
from electrax.models.linear import Linear
from electrax.models.masks import one_way_mask, sees_neighbour


class MaskedLMHead(nn.Module):
    """Hidden states -> float32 logits over the padded vocabulary; the word table is the output layer's kernel."""

    config: EncoderConfig

    def setup(self):
        c = self.config
        self.dense = Linear(c.embedding_width, dtype=c.dtype, kernel_init=c.kernel_init())
        self.norm = c.norm()
        self.output_bias = self.param("output_bias", nn.initializers.zeros, (c.padded_vocab_size,))

    def __call__(self, hidden: Float[Array, "B N D"], word: Float[Array, "V E"]) -> Float[Array, "B N V"]:
        return self.logits(self.transform(hidden), word)

    def transform(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        """What the word table is multiplied with."""
        return self.norm(gelu(self.dense(hidden)))

    def logits(self, x: Float[Array, "B N E"], word: Float[Array, "V E"]) -> Float[Array, "B N V"]:
        """Padded entries get the lowest float32, so that they can be neither predicted nor sampled."""
        c = self.config
        logits = jnp.einsum("bne,ve->bnv", x, word.astype(c.dtype), preferred_element_type=jnp.float32)
        # the lowest number swallows whatever is added to it: a choice of B x N x V values costs more than one of V
        is_token = jnp.arange(c.padded_vocab_size) < c.vocab_size
        return logits + jnp.where(is_token, self.output_bias, jnp.finfo(jnp.float32).min)[None, None]


class Generator(nn.Module):
    """Embedded text -> what the masked-out tokens may have been.

    `two_tower` (Electric's): one encoder reads forwards and another backwards, and a place is predicted from their
    states at its two neighbours. So the logits there do not depend on its token, and nothing needs to be masked out.
    """

    config: EncoderConfig
    two_tower: bool = False
    wrap: bool = False  # the first place's neighbour is the last, as in the reference, even if that saw the token

    def setup(self):
        self.head = MaskedLMHead(self.config)

    def __call__(
        self,
        embedded: Float[Array, "B L E"],
        word: Float[Array, "V E"],
        mask: Mask,
        slots: Int[Array, "B M"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        seed: Seed | None = None,
    ) -> Float[Array, "B N V"]:
        """Logits at the places `slots` of each row (N = M), or at all of them (N = L) where none are named."""
        return self.head.logits(self.states(embedded, mask, slots, positions, seed), word)

    @nn.compact
    def states(
        self,
        embedded: Float[Array, "B L E"],
        mask: Mask,
        slots: Int[Array, "B M"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        seed: Seed | None = None,
    ) -> Float[Array, "B N E"]:
        """What `MaskedLMHead.logits` takes: all of the generator but its largest part, the vocabulary."""

        def read(name: str, mask: Mask, seed: Seed | None) -> Float[Array, "B L D"]:
            return Encoder(self.config, name=name)(embedded, mask, positions, seed)

        if self.two_tower:
            forwards = read("encoder", one_way_mask(mask), seed)
            backwards = read("backward_encoder", one_way_mask(mask, True), fold(seed, self.config.layers + 1))
            hidden = jnp.concatenate([self._moved(forwards, mask, 1), self._moved(backwards, mask, -1)], axis=-1)
        else:
            hidden = read("encoder", mask, seed)
        if slots is not None:
            hidden = jnp.take_along_axis(hidden, slots[..., None], axis=1)
        return self.head.transform(hidden)

    def _moved(self, hidden: Float[Array, "B L D"], mask: Mask, step: int) -> Float[Array, "B L D"]:
        """The state `step` places before; zeros where the row or the document ends there."""
        moved = jnp.roll(hidden, step, axis=1)
        return moved if self.wrap else jnp.where(sees_neighbour(mask, step)[..., None], moved, 0)
