"""The generator: a small encoder with a language-model head."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from electrax.models.attention import KeyValues, Mask
from electrax.models.dropout import Seed, fold
from electrax.models.encoder import Encoder, EncoderConfig, gelu
from electrax.models.linear import Linear
from electrax.models.masks import one_way_mask, sees_neighbour
from electrax.models.products import product

# masked: a masked LM. causal: a left-to-right LM. hybrid: one that is both, each for some of the rows (GPT-BERT).
# two_tower: one reads forwards, one backwards, none sees the token it predicts (Electric's).
# shared: the discriminator's own encoder with a head (the reference's untied_generator=False)
GeneratorKind = Literal["masked", "causal", "hybrid", "two_tower", "shared"]


class MaskedLMHead(nn.Module):
    """Hidden states -> float32 logits over the padded vocabulary; the word table is the output layer's kernel, and in a
    bare body all there is."""

    config: EncoderConfig

    def setup(self):
        c = self.config
        if c.traits.bare:
            return
        self.dense = Linear(c.embedding_width, dtype=c.dtype, kernel_init=c.kernel_init())
        self.norm = c.norm()
        self.output_bias = self.param("output_bias", nn.initializers.zeros, (c.padded_vocab_size,))

    def __call__(self, hidden: Float[Array, "B N D"], word: Float[Array, "V E"]) -> Float[Array, "B N V"]:
        return self.logits(self.transform(hidden), word)

    def transform(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        """What the word table is multiplied with."""
        return hidden if self.config.traits.bare else self.norm(gelu(self.dense(hidden)))

    def logits(self, x: Float[Array, "B N E"], word: Float[Array, "V E"]) -> Float[Array, "B N V"]:
        """Padded entries get the lowest float32, so that they can be neither predicted nor sampled."""
        c = self.config
        logits = product("ne,ve->nv", x.reshape(-1, x.shape[-1]), word, c.dtype, jnp.float32)
        logits = logits.reshape(*x.shape[:-1], -1)
        # the lowest number swallows whatever is added to it: a choice of B x N x V values costs more than one of V
        is_token = jnp.arange(c.padded_vocab_size) < c.vocab_size
        bias = jnp.zeros(c.padded_vocab_size) if c.traits.bare else self.output_bias
        return logits + jnp.where(is_token, bias, jnp.finfo(jnp.float32).min)[None, None]


class Generator(nn.Module):
    """Embedded text -> what the tokens at some of its places may be. The kinds differ in what they predict it from:

    - `masked` and `shared`: the state at the place, whose token is masked out, of an encoder that reads both ways.
    - `causal`: the state at the place before, of one that reads forwards.
    - `hybrid` (Charpentier and Samuel 2024, GPT-BERT): the state at the place before, too; of some rows read forwards,
      and of the others read both ways, with the token masked out.
    - `two_tower` (Electric's): the states at both neighbours, of one that reads forwards and one that reads backwards.

    So with what reads one way the logits at a place do not depend on its token, and nothing needs to be masked out.
    """

    config: EncoderConfig
    kind: GeneratorKind = "masked"
    wrap: bool = False  # two_tower: the first place's neighbour is the last, as in the reference, even if that saw it

    def setup(self):
        self.encoder = Encoder(self.config)
        if self.kind == "two_tower":
            self.backward_encoder = Encoder(self.config)
        self.head = MaskedLMHead(self.config)

    def __call__(
        self,
        embedded: Float[Array, "B L E"],
        word: Float[Array, "V E"],
        mask: Mask,
        slots: Int[Array, "B M"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        seed: Seed | None = None,
        causal: Bool[Array, "B"] | None = None,
    ) -> Float[Array, "B N V"]:
        """Logits at the places `slots` of each row (N = M), or at all of them (N = L) where none are named. `mask` says
        which tokens are of one text, `causal` which rows a hybrid reads forwards (default: none)."""
        return self.head.logits(self.states(embedded, mask, slots, positions, seed, causal), word)

    def states(
        self,
        embedded: Float[Array, "B L E"],
        mask: Mask,
        slots: Int[Array, "B M"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        seed: Seed | None = None,
        causal: Bool[Array, "B"] | None = None,
    ) -> Float[Array, "B N E"]:
        """What `MaskedLMHead.logits` takes: all of the generator but its largest part, the vocabulary."""
        match self.kind:
            case "two_tower":
                forwards = self.encoder(embedded, one_way_mask(mask), positions, seed)
                other = fold(seed, self.config.layers + 1)
                backwards = self.backward_encoder(embedded, one_way_mask(mask, True), positions, other)
                hidden = jnp.concatenate([self._moved(forwards, mask, 1), self._moved(backwards, mask, -1)], axis=-1)
            case "causal":
                hidden = self._moved(self.encoder(embedded, one_way_mask(mask), positions, seed), mask, 1)
            case "hybrid":
                seen = mask if causal is None else jnp.where(causal[:, None, None, None], one_way_mask(mask), mask)
                hidden = self._moved(self.encoder(embedded, seen, positions, seed), mask, 1)
            case _:
                hidden = self.encoder(embedded, mask, positions, seed)
        if slots is not None:
            hidden = jnp.take_along_axis(hidden, slots[..., None], axis=1)
        return self.head.transform(hidden)

    def _moved(self, hidden: Float[Array, "B L D"], mask: Mask, step: int) -> Float[Array, "B L D"]:
        """The state `step` places before; zeros where the row or the document ends there."""
        moved = jnp.roll(hidden, step, axis=1)
        return moved if self.wrap else jnp.where(sees_neighbour(mask, step)[..., None], moved, 0)

    def next_logits(
        self,
        embedded: Float[Array, "B T E"],
        word: Float[Array, "V E"],
        mask: Bool[Array, "B 1 T L"],
        positions: Int[Array, "B T"],
        cache: list[KeyValues],
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "B T V"], list[KeyValues]]:
        """For decoding with a causal or hybrid generator: of the T tokens at the places from `start` on, the logits of
        the token after each, and the `cache` of L places a layer with theirs written into it. `mask` says which places
        each reads: at most its own and those before."""
        hidden, cache = self.encoder(embedded, mask, positions, cache=cache, start=start)
        return self.head(hidden, word), cache
