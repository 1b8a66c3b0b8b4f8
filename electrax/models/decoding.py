"""From a decoder's step to whole texts: greedily, by sampling, or by beam search. Pure functions of arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Cache = Any  # a tree of arrays whose first axis is the row
# (cache, the tokens [B] at a place, that place) -> (float32 logits [B, V] of the tokens after them, cache)
Step = Callable[[Cache, Int[Array, "B"], Int[Array, ""]], tuple[Float[Array, "B V"], Cache]]
LOWEST = jnp.finfo(jnp.float32).min


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits, in the order of the fields; the default is the arg max."""

    repetition_penalty: float = 1.0  # logits of tokens that were there are divided by it, or multiplied if negative
    temperature: float = 0.0  # 0: the likeliest
    top_k: int = 0  # of the likeliest tokens so many only; 0: all
    top_p: float = 1.0  # of the likeliest tokens the fewest whose probabilities sum to it


class Decoded(NamedTuple):
    """Tokens of each row, `fill` after the end token, how many they are with the end token, and their log-probability,
    or of beam search their score."""

    ids: Int[Array, "*B T"]
    lengths: Int[Array, "*B"]
    scores: Float[Array, "*B"]


def choose(
    sampling: Sampling, keys: Key[Array, "B"], logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None = None
) -> Int[Array, "B"]:
    """The next token of each row, drawn with the row's key. `seen` says which tokens the penalty is for (Keskar et al.
    2019, CTRL, section 4.1)."""
    if sampling.repetition_penalty != 1.0 and seen is not None:
        p = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / p, logits * p), logits)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, LOWEST, logits)
    if sampling.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(shares, axis=-1) - shares < sampling.top_p  # what is before a token does not suffice
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, LOWEST, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def decode(
    step: Step,
    cache: Cache,
    first: Int[Array, "B"],
    length: int,
    end_id: int,
    fill_id: int,
    *,
    start: Int[Array, ""] | int = 0,
    sampling: Sampling = Sampling(),
    keys: Key[Array, "B"] | None = None,
    seen: Bool[Array, "B V"] | None = None,
    limits: Int[Array, "B"] | None = None,
) -> Decoded:
    """Up to `length` tokens (`limits` of each row) after the tokens `first`, which stand at the place `start`; a row
    ends with `end_id`.

    Row b's i-th token is drawn with fold_in(keys[b], i), so it depends on no other row. `seen` are the tokens that the
    repetition penalty is for from the start on; those decoded are added. `scores` are sums of log-probabilities.
    """
    rows = first.shape[0]
    keys = jax.random.split(jax.random.key(0), rows) if keys is None else keys
    penalised = sampling.repetition_penalty != 1.0
    limits = jnp.full(rows, length) if limits is None else jnp.minimum(limits, length)

    def unfinished(carry):
        return ~jnp.all(carry[4])

    def body(carry):
        i, cache, token, ids, done, lengths, scores, seen = carry
        logits, cache = step(cache, token, start + i)
        each = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        token = choose(sampling, each, logits, seen if penalised else None)
        log_prob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        token = jnp.where(done, fill_id, token)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, token[:, None], i, axis=1)
        lengths, scores = lengths + ~done, scores + jnp.where(done, 0.0, log_prob)
        if penalised:
            seen = seen.at[jnp.arange(rows), token].set(True)
        done |= (token == end_id) | (i + 1 >= limits)
        return i + 1, cache, token, ids, done, lengths, scores, seen

    ids = jnp.full((rows, length), fill_id, jnp.int32)
    if penalised and seen is None:
        logits = jax.eval_shape(step, cache, first, jnp.int32(0))[0]
        seen = jnp.zeros(logits.shape, bool)
    counted = jnp.zeros(rows, jnp.int32)
    carry = (jnp.int32(0), cache, first, ids, limits < 1, counted, jnp.zeros(rows), seen if penalised else None)
    _, _, _, ids, _, lengths, scores, _ = jax.lax.while_loop(unfinished, body, carry)
    return Decoded(ids, lengths, scores)


def _lengths(ids: Int[Array, "*B T"], end_id: int) -> Int[Array, "*B"]:
    """Tokens up to the first end token, that too, or all: a row without one is as long as there is room."""
    is_end = ids == end_id
    return jnp.where(jnp.any(is_end, axis=-1), jnp.argmax(is_end, axis=-1) + 1, ids.shape[-1]).astype(jnp.int32)


def beam_search(
    step: Step,
    cache: Cache,
    first: Int[Array, "B"],
    length: int,
    end_id: int,
    fill_id: int,
    *,
    beams: int,
    n_best: int = 1,
    length_penalty: float = 1.0,
    penalty: Callable[[Cache], Float[Array, "R"]] | None = None,
) -> Decoded:
    """The `n_best` best of `beams` continuations of each row [B, n_best, T], the best first.

    A continuation ends with `end_id` or has `length` tokens. Its score is its log-probability divided by
    ((5 + tokens) / 6) ** length_penalty (Wu et al. 2016, section 7), and what `penalty`, at most 0, makes of the cache
    at its end is added. The rows of `cache` are those of `first` times `beams`, the beams of a row together. A row is
    done, whatever is beside it, when none of its live beams would come among its `n_best` if it ended now.
    """
    rows = first.shape[0]

    def normalised(scores, tokens):
        return scores / ((5.0 + tokens.astype(jnp.float32)) / 6.0) ** length_penalty

    def body(carry):
        i, cache, token, ids, live, kept, best, done = carry
        logits, cache = step(cache, token.reshape(-1), i)
        scores, parents, tokens = _likeliest(logits, live)
        longer = jnp.take_along_axis(ids, parents[:, :, None], axis=1)
        longer = jax.lax.dynamic_update_slice_in_dim(longer, tokens[:, :, None], i, axis=2)
        over = (tokens == end_id) | (i + 1 == length)
        counts = over & (scores > LOWEST) & ~done[:, None]
        final = normalised(scores, i + 1)
        if penalty is not None:
            final += jnp.take_along_axis(penalty(cache).reshape(rows, beams), parents, axis=1)
        ended = jnp.where(counts, final, LOWEST)
        best, order = jax.lax.top_k(jnp.concatenate([best, ended], axis=1), beams)
        kept = jnp.take_along_axis(jnp.concatenate([kept, longer], axis=1), order[:, :, None], axis=1)
        live, order = jax.lax.top_k(jnp.where(over, LOWEST, scores), beams)
        parents = jnp.take_along_axis(parents, order, axis=1)
        flat = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)
        cache = jax.tree.map(lambda leaf: leaf[flat], cache)
        ids, token = jnp.take_along_axis(longer, order[:, :, None], axis=1), jnp.take_along_axis(tokens, order, axis=1)
        done |= (best[:, n_best - 1] >= normalised(live[:, 0], i + 2)) | (i + 1 == length)
        return i + 1, cache, token, ids, live, kept, best, done

    ids = jnp.full((rows, beams, length), fill_id, jnp.int32)
    live = jnp.full((rows, beams), LOWEST).at[:, 0].set(0.0)  # all beams start as one
    token = jnp.broadcast_to(first[:, None], (rows, beams))
    carry = (jnp.int32(0), cache, token, ids, live, ids, jnp.full((rows, beams), LOWEST), jnp.zeros(rows, bool))
    *_, kept, best, _ = jax.lax.while_loop(lambda carry: ~jnp.all(carry[-1]), body, carry)
    kept, best = kept[:, :n_best], best[:, :n_best]
    return Decoded(kept, _lengths(kept, end_id), best)


def _likeliest(
    logits: Float[Array, "R V"], live: Float[Array, "B K"]
) -> tuple[Float[Array, "B C"], Int[Array, "B C"], Int[Array, "B C"]]:
    """Of all that the K live beams of a row can become, the 2 K likeliest: log-probability, beam and token. One token
    of a beam at most is its end, so that K of them go on."""
    rows, beams = live.shape
    each = min(2 * beams, logits.shape[-1])
    likeliest, tokens = jax.lax.top_k(logits, each)
    gain = likeliest - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = (live[:, :, None] + gain.reshape(rows, beams, each)).reshape(rows, -1)
    scores, places = jax.lax.top_k(scores, min(2 * beams, beams * each))
    return scores, places // each, jnp.take_along_axis(tokens.reshape(rows, -1), places, axis=1).astype(jnp.int32)
