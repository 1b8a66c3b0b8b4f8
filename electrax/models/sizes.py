"""The paper's model sizes, and how a few config keys become the two towers' shapes."""

import dataclasses
from typing import Literal

from electrax.config import UserError
from electrax.models.attention import Implementation
from electrax.models.encoder import Body, EncoderConfig
from electrax.models.generator import GeneratorKind
from electrax.models.lookup import LookupGradient


@dataclasses.dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    embedding_width: int
    generator_fraction: float  # of the width and the feed-forward width; the depth is the discriminator's


# heads are width / 64 and feed-forward 4 x width in every published size (paper, table 6)
SIZES = {
    "tiny": Size(3, 128, 2, 128, 0.5),
    "small": Size(12, 256, 4, 128, 1 / 4),
    "base": Size(12, 768, 12, 768, 1 / 3),
    "large": Size(24, 1024, 16, 1024, 1 / 4),
    "small++": Size(12, 256, 4, 128, 1.0),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The discriminator. A size of the paper, and any number of it changed by name (0: as the size has it)."""

    size: Literal["tiny", "small", "base", "large", "small++"] = "small"
    body: Body = "electra"  # the reference's; modern: pre-norm, rotary, GeGLU, without biases; gpt2: GPT-2's
    layers: int = 0
    width: int = 0
    heads: int = 0
    feed_forward: int = 0
    embedding_width: int = 0
    max_length: int = 512  # positions
    qk_norm: bool = False  # RMSNorm of queries and keys
    dropout: float = 0.1
    attention_dropout: float = 0.1
    # fused: a GPU kernel, for training; xla and cudnn: jax.nn.dot_product_attention's, without attention dropout
    attention: Implementation = "plain"
    residual: Literal["plain", "fused"] = "plain"  # dropout, sum and norm of body electra; fused: a GPU kernel, too
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of products; weights and losses are float32
    lookup_gradient: LookupGradient = "auto"  # of the word table: scatter, or sums within a row first (auto: on CUDA)
    scan_layers: bool | None = None  # compiles one layer instead of all, slower to run; None: where they are over 12
    remat: bool = False  # computes activations again in the backward pass, to save memory
    remat_keep: Literal["nothing", "products"] = "nothing"  # what remat does not compute again


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The generator: by fraction of the discriminator (0: the size's fraction, 1 for the depth) or by number."""

    kind: GeneratorKind = "masked"
    init_from: str = ""  # a language model alone (a work directory, or of another format): its shape, and its weights
    body: Literal["", "electra", "modern", "gpt2"] = ""  # default: the discriminator's
    width_fraction: float = 0.0
    layers_fraction: float = 1.0
    width: int = 0
    layers: int = 0
    heads: int = 0
    feed_forward: int = 0
    embeddings: Literal["shared", "separate"] = "shared"  # word, position, type and their norm, one set or two


def discriminator_shape(model: ModelConfig, vocab_size: int) -> EncoderConfig:
    """Raises UserError where the numbers do not fit together."""
    size = SIZES[model.size]
    width = model.width or size.width
    return _checked(
        "model",
        vocab_size=vocab_size,
        layers=model.layers or size.layers,
        width=width,
        heads=model.heads or (size.heads if width == size.width else max(1, width // 64)),
        feed_forward=model.feed_forward or 4 * width,
        embedding_width=model.embedding_width
        or (width if size.embedding_width == size.width else size.embedding_width),
        max_length=model.max_length,
        body=model.body,
        qk_norm=model.qk_norm,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        attention=model.attention,
        residual=model.residual,
        compute_dtype=model.compute_dtype,
        lookup_gradient=model.lookup_gradient,
        scan_layers=model.scan_layers,
        remat=model.remat,
        remat_keep=model.remat_keep,
    )


def generator_shape(model: ModelConfig, generator: GeneratorConfig, discriminator: EncoderConfig) -> EncoderConfig:
    """Width round(D · fraction), depth round(N · fraction), heads max(1, width // 64), feed-forward 4 x width.

    Separate embeddings are as wide as the generator, so that it needs no projection. A shared encoder is the
    discriminator's: raises UserError where a key says something else.
    """
    if generator.kind == "shared":
        plain = GeneratorConfig(kind="shared")
        keys = [f.name for f in dataclasses.fields(plain) if getattr(generator, f.name) != getattr(plain, f.name)]
        if keys:
            named = ", ".join(f"generator.{key}" for key in keys)
            raise UserError(f'generator.kind "shared" is the discriminator\'s own encoder; leave out {named}')
        return discriminator
    fraction = generator.width_fraction or SIZES[model.size].generator_fraction
    width = generator.width or round(discriminator.width * fraction)
    body = generator.body or discriminator.body
    layers = generator.layers or max(1, round(discriminator.layers * generator.layers_fraction))
    return _checked(
        "generator",
        **{
            **dataclasses.asdict(discriminator),
            "body": body,
            "qk_norm": discriminator.qk_norm and body == discriminator.body,
            "width": width,
            "layers": layers,
            "heads": generator.heads or max(1, width // 64),
            "feed_forward": generator.feed_forward or 4 * width,
            "embedding_width": width if generator.embeddings == "separate" else discriminator.embedding_width,
        },
    )


def _checked(section: str, **fields) -> EncoderConfig:
    try:
        return EncoderConfig(**fields)
    except ValueError as error:
        raise UserError(f"[{section}] {error}") from None
