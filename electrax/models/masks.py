"""What a row of token ids says about itself: its documents, their positions, its segments, who may see whom."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def document_index(ids: Int[Array, "B L"], cls_id: int, pad_id: int) -> Int[Array, "B L"]:
    """1, 2, 3 … for the documents of a packed row, each of which starts with [CLS]; 0 for padding."""
    return jnp.where(ids == pad_id, 0, jnp.cumsum(ids == cls_id, axis=1))


def document_positions(ids: Int[Array, "B L"], cls_id: int) -> Int[Array, "B L"]:
    """Positions that start again at 0 with every [CLS], so that a document looks the same wherever it lies in a row."""
    place = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return place - jax.lax.cummax(jnp.where(ids == cls_id, place, 0), axis=1)


def segment_ids(ids: Int[Array, "B L"], sep_id: int, pad_id: int) -> Int[Array, "B L"]:
    """Type ids of a sentence pair: 0 up to and including the first [SEP], then 1, and 0 for padding."""
    separators = (ids == sep_id).astype(jnp.int32)
    return jnp.where(ids == pad_id, 0, jnp.minimum(jnp.cumsum(separators, axis=1) - separators, 1))


def padding_mask(real: Bool[Array, "B L"]) -> Bool[Array, "B 1 1 L"]:
    """Every query attends to the real tokens of its row."""
    return real[:, None, None, :]


def document_mask(documents: Int[Array, "B L"]) -> Bool[Array, "B 1 L L"]:
    """A token attends to its own document only."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def one_way_mask(mask: Bool[Array, "B 1 Q L"], backwards: bool = False) -> Bool[Array, "B 1 L L"]:
    """Of what `mask` allows, the token itself and those before it; `backwards`, itself and those after it."""
    length = mask.shape[-1]
    earlier = jnp.tril(jnp.ones((length, length), bool))
    return mask & (earlier.T if backwards else earlier)[None, None]


def sees_neighbour(mask: Bool[Array, "B 1 Q L"], step: int) -> Bool[Array, "B L"]:
    """Whether the token `step` places before (after, where negative) is in the row and `mask` allows it."""
    return jnp.any(mask[:, 0] & jnp.eye(mask.shape[-1], k=-step, dtype=bool)[None], axis=-1)
