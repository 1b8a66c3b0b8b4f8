"""The discriminator: an encoder that tells for each token whether it was replaced."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from electrax.models.attention import Mask
from electrax.models.dropout import Seed
from electrax.models.encoder import Encoder, EncoderConfig, gelu
from electrax.models.linear import Linear


class ReplacedTokenHead(nn.Module):
    """Hidden states [B, L, D] -> float32 logits [B, L]; above 0 means "replaced"."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L"]:
        c = self.config
        x = gelu(Linear(c.width, dtype=c.dtype, kernel_init=c.kernel_init(), name="dense")(hidden))
        # float32 output layer, initialised by TensorFlow's default as in the reference
        output = Linear(1, dtype=jnp.float32, kernel_init=nn.initializers.glorot_uniform(), name="output")
        return output(x)[..., 0]


class Discriminator(nn.Module):
    """Embedded text -> one logit a token."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        embedded: Float[Array, "B L E"],
        mask: Mask,
        positions: Int[Array, "B L"] | None = None,
        seed: Seed | None = None,
    ) -> Float[Array, "B L"]:
        hidden = Encoder(self.config, name="encoder")(embedded, mask, positions, seed)
        return ReplacedTokenHead(self.config, name="head")(hidden)
