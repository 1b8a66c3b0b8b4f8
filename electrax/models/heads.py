"""What stands on the encoder after pretraining: output layers for texts, words and spans."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from electrax.models.dropout import Seed, dropout, fold
from electrax.models.encoder import EncoderConfig, gelu
from electrax.models.linear import Linear

HeadStyle = Literal["linear", "dense", "pooled"]


class OutputHead(nn.Module):
    """Hidden states [B, …, D] -> float32 logits [B, …, outputs].

    `linear`: dropout and one layer, as the reference; `dense`: dropout, a layer with GELU, dropout and the output
    layer, as Transformers' head for ELECTRA; `pooled`: a layer with tanh, dropout and the output layer, as for BERT.
    TensorFlow's default initialiser, as in the reference.
    """

    config: EncoderConfig
    outputs: int
    style: HeadStyle = "linear"

    @nn.compact
    def __call__(self, hidden: Float[Array, "B *rest D"], seed: Seed | None = None) -> Float[Array, "B *rest C"]:
        c = self.config
        x = hidden if self.style == "pooled" else dropout(hidden, c.dropout, fold(seed, 0))
        if self.style != "linear":
            activation = jnp.tanh if self.style == "pooled" else gelu
            x = activation(Linear(c.width, dtype=c.dtype, kernel_init=c.kernel_init(), name="dense")(x))
            x = dropout(x, c.dropout, fold(seed, 1))
        init = nn.initializers.glorot_uniform()
        return Linear(self.outputs, dtype=jnp.float32, kernel_init=init, name="output")(x)
