"""Matrix-product FLOPs of a model: what the hardware must do, and the paper's way of counting beside it."""

import functools
import re
import time

import jax
import jax.numpy as jnp

from electrax.models.encoder import EncoderConfig
from electrax.models.products import product

# dense bf16 FLOP/s by the vendors' data sheets, by words of the name JAX gives the device
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


@functools.cache
def peak_flops(device: jax.Device, dtype: str = "float32") -> float:
    """FLOP/s that utilisation is measured against: known by name, else that of a matrix product in `dtype`, timed
    once."""
    for name, peak in PEAKS.items():
        if re.search(rf"{name}\b", device.device_kind):
            return peak
    size = 1024 if device.platform == "cpu" else 8192  # that a product takes longer than its call
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    square = jax.jit(lambda a: product("ij,jk->ik", a, a, dtype))
    square(x).block_until_ready()
    best = float("inf")
    for _ in range(24):
        start = time.perf_counter()
        square(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def encoder_forward(c: EncoderConfig, length: int, first: int | None = None) -> float:
    """Of one token in rows of `length`; look-ups, norms and activations are free. Multiply and add are two. With
    `first` the mean over a row's tokens, of which the last layer gives the first ones' states alone."""
    projection = 2 * c.embedding_width * c.width if c.embedding_width != c.width else 0
    queries_keys_values, output = 2 * c.width * 3 * c.width, 2 * c.width * c.width
    feed_forward = 2 * c.width * c.feed_forward * (3 if c.traits.gated else 2)
    states = 2 * 2 * length * c.width + output + feed_forward  # what is done for each state of a layer
    left_out = 0.0 if first is None else 1 - min(first, length) / length
    return projection + c.layers * (queries_keys_values + states) - left_out * states


def masked_lm_forward(c: EncoderConfig, towers: int = 1) -> int:
    """Of one predicted position: the head's dense layer over one state a tower, and the product with the word table."""
    dense = 0 if c.traits.bare else 2 * towers * c.width * c.embedding_width
    return dense + 2 * c.embedding_width * c.padded_vocab_size


def pretraining_step(
    generator: EncoderConfig, discriminator: EncoderConfig | None, rows: int, length: int, slots: int, towers: int = 1
) -> float:
    """Of one training step: the backward pass is twice the forward. The vocabulary is met at the `slots` predicted
    positions of a row only; the generator has `towers` encoders of its shape."""
    forward = towers * length * encoder_forward(generator, length) + slots * masked_lm_forward(generator, towers)
    if discriminator is not None:
        head = 2 * discriminator.width * discriminator.width + 2 * discriminator.width
        forward += length * (encoder_forward(discriminator, length) + head)
    return 3.0 * rows * forward


def paper_step(generator: EncoderConfig, discriminator: EncoderConfig | None, rows: int, length: int) -> float:
    """Of one training step as the reference counts (its flops_computation.py), for comparison with published figures.

    The backward pass costs as much as the forward, a look-up is a product with a one-hot vector, the vocabulary is met
    at 15.6 % of the positions, and what is no product counts too. It knows the `electra` body alone.
    """
    towers = [(generator, _paper_masked_lm(generator))]
    if discriminator is not None:
        towers.append((discriminator, 2 * discriminator.width**2 + 11 * discriminator.width))
    return 2.0 * rows * length * sum(_paper_encoder(c, length) + head for c, head in towers)


def _paper_encoder(c: EncoderConfig, length: int) -> int:
    """Forward of a token. Dropout is 4 operations, LayerNorm 5, an activation 8, softmax 5; the reference counts the
    norm after attention once instead of once a unit."""
    attention = 8 * c.width**2 + 4 * length * c.width + 10 * length * c.heads + 9 * c.width + 5
    feed_forward = 4 * c.width * c.feed_forward + 9 * c.feed_forward + 11 * c.width
    one_hot = 2 * c.embedding_width * (c.vocab_size + length + 2)
    projection = 2 * c.embedding_width * c.width + c.width if c.embedding_width != c.width else 0
    return c.layers * (attention + feed_forward) + one_hot + 11 * c.embedding_width + projection


def _paper_masked_lm(c: EncoderConfig) -> float:
    dense = 2 * c.width * c.embedding_width + 14 * c.embedding_width
    return 0.15625 * (dense + 2 * c.embedding_width * c.vocab_size + 7 * c.vocab_size)
