"""What a pretrained model computes, as pure functions of its shape, its parameters and token ids."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from electrax.inference.packing import pooled
from electrax.models.decoding import LOWEST
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.generator import Generator, GeneratorKind
from electrax.models.masks import document_mask, one_way_mask, padding_mask
from electrax.tasks.base import Params

PadId = int | Int[Array, ""]


def encode(
    config: EncoderConfig,
    tower: Literal["discriminator", "generator"],
    one_way: bool,
    params: Params,
    ids: Int[Array, "B L"],
    pad_id: PadId,
    documents: Int[Array, "B L"] | None = None,
    positions: Int[Array, "B L"] | None = None,
    first: int | None = None,
) -> Float[Array, "B N D"]:
    """Last hidden states of all N = L tokens or of the `first` ones, float32, zeros where padding stands. Rows are of
    one text each, or of several, with the text of each token in `documents` and its place there in `positions`;
    `one_way` is for a causal LM."""
    embedded = Embeddings(config).apply({"params": params["embeddings"]}, ids, None, positions)
    mask = padding_mask(ids != pad_id) if documents is None else document_mask(documents)
    mask = one_way_mask(mask) if one_way else mask
    hidden = Encoder(config).apply({"params": params[tower]["encoder"]}, embedded, mask, positions, first=first)
    return jnp.where((ids != pad_id)[:, :first, None], hidden.astype(jnp.float32), 0.0)


def pool(
    config: EncoderConfig,
    tower: Literal["discriminator", "generator"],
    one_way: bool,
    pooling: Literal["mean", "cls"],
    params: Params,
    ids: Int[Array, "B L"],
    pad_id: PadId,
    documents: Int[Array, "B L"] | None = None,
    positions: Int[Array, "B L"] | None = None,
) -> Float[Array, "B *T D"]:
    """One vector a text, the mean of its tokens' or that of [CLS]: [B, D], or with `documents` as `pooled` has them."""
    if documents is None and pooling == "cls":
        return encode(config, tower, one_way, params, ids, pad_id, first=1)[:, 0]
    hidden = encode(config, tower, one_way, params, ids, pad_id, documents, positions)
    if documents is not None:
        return pooled(hidden, documents, positions, pooling)
    return jnp.sum(hidden, axis=1) / jnp.maximum(jnp.sum(ids != pad_id, axis=1), 1)[:, None]


def detect(config: EncoderConfig, params: Params, ids: Int[Array, "B L"], pad_id: PadId) -> Float[Array, "B L"]:
    """The discriminator's logits: above 0 a token looks replaced."""
    embedded = Embeddings(config).apply({"params": params["embeddings"]}, ids)
    return Discriminator(config).apply({"params": params["discriminator"]}, embedded, padding_mask(ids != pad_id))


def fill(
    config: EncoderConfig,
    kind: GeneratorKind,
    params: Params,
    ids: Int[Array, "B L"],
    pad_id: PadId,
    slots: Int[Array, "B K"] | None = None,
) -> Float[Array, "B N V"]:
    """The generator's logits over the padded vocabulary, at every place or at the K `slots` of a row."""
    table = params.get("generator_embeddings", params["embeddings"])
    embedded = Embeddings(config).apply({"params": table}, ids)
    mask = padding_mask(ids != pad_id)
    return Generator(config, kind).apply({"params": params["generator"]}, embedded, table["word"], mask, slots)


def sample(
    config: EncoderConfig,
    kind: GeneratorKind,
    special: Mapping[str, int],
    params: Params,
    ids: Int[Array, "B L"],
    uniform: Int[Array, "B L"],
    temperature: float,
) -> Int[Array, "B L"]:
    """A token for each place, drawn at the share `uniform` / 2^30 of the generator's distribution; none of `special`,
    the ids by role."""
    logits = fill(config, kind, params, ids, special["pad"])
    logits = logits.at[..., jnp.array(list(special.values()))].set(LOWEST)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    shares = jnp.cumsum(jax.nn.softmax(logits / temperature, axis=-1), axis=-1)
    return jnp.sum(shares <= uniform[..., None] / 2**30 * shares[..., -1:], axis=-1)


def likelihood(
    config: EncoderConfig,
    kind: GeneratorKind,
    params: Params,
    ids: Int[Array, "B L"],
    true: Int[Array, "B L"],
    pad_id: PadId,
) -> Float[Array, " B"]:
    """The log-probability of the one token of each row that `true` names; -1 elsewhere."""
    logits = fill(config, kind, params, ids, pad_id, jnp.argmax(true, axis=1)[:, None])[:, 0]
    token = jnp.max(true, axis=1)
    return jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
