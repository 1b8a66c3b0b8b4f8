"""The one dense layer of the models."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from electrax.models.products import product


class Linear(nn.Module):
    """x @ kernel + bias over the last `inputs` axes of x, giving `features` (one axis or several).

    The product is of `dtype`, and the result of the type of activations that goes with it (models/products.py). It is
    always of two matrices: with rows [B, L] kept apart, XLA transposes a copy of both operands for the kernel's
    gradient, which costs more than the product itself on a CPU.
    """

    features: int | tuple[int, ...]
    inputs: int = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        rows, within = x.shape[: x.ndim - self.inputs], x.shape[x.ndim - self.inputs :]
        features = (self.features,) if isinstance(self.features, int) else self.features
        fan_in, fan_out = math.prod(within), math.prod(features)
        kernel = self.param(
            "kernel", lambda key: self.kernel_init(key, (fan_in, fan_out), jnp.float32).reshape(*within, *features)
        )
        y = product("nd,df->nf", x.reshape(-1, fan_in), kernel.reshape(fan_in, fan_out), self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features)
            y = y + bias.reshape(1, -1).astype(y.dtype)
        return y.reshape(*rows, *features)
