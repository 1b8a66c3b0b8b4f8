"""Masking, sampling and replacing: pure functions of a row and its random key (reference: pretrain_helpers.py)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

TINY = 1e-9  # keeps the logarithms of the reference's Gumbel noise finite
BLOCK = 128  # tokens summed together before one of them is looked for


def slot_count(length: int, mask_prob: float) -> int:
    """Slots a row of `length` keeps for masked positions: int((p + 0.005) · L), at most L."""
    return min(length, int((mask_prob + 0.005) * length))


def choose_slots(
    key: Key[Array, ""],
    candidates: Bool[Array, "L"],
    tokens: Int[Array, ""],
    mask_prob: float,
    slots: int,
    with_replacement: bool = False,
) -> tuple[Int[Array, "M"], Bool[Array, "M"]]:
    """Positions to predict in one row, and which of the M slots are used; unused slots have position 0.

    k = clip(round(tokens · p), 1, M) slots are used (round half to even; `tokens` counts [CLS] and [SEP]). They are
    drawn uniformly from the candidates without replacement, or independently, so that a position can come twice, as
    the reference does.
    """
    k = jnp.clip(jnp.round(tokens * mask_prob).astype(jnp.int32), 1, slots)
    if with_replacement:
        log_p = jnp.where(candidates, 0.0, -jnp.inf)
        positions = jax.random.categorical(key, log_p, shape=(slots,))
        used = jnp.any(candidates) & (jnp.arange(slots) < k)
    else:
        noise = jnp.where(candidates, jax.random.uniform(key, candidates.shape), -1.0)
        positions = jnp.argsort(-noise)[:slots]  # a top_k would fetch the rows of all devices
        used = (noise[positions] >= 0) & (jnp.arange(slots) < k)
    return jnp.where(used, positions, 0).astype(jnp.int32), used


def write_at(
    ids: Int[Array, "L"], positions: Int[Array, "M"], values: Int[Array, "M"], written: Bool[Array, "M"]
) -> Int[Array, "L"]:
    """`ids` with `values` at `positions`. Where a position comes twice, the floor of the mean of its values; nothing
    is ever written at index 0 (the reference's way of dropping unused slots)."""
    positions = jnp.where(written, positions, 0)
    total = jnp.zeros_like(ids).at[positions].add(values.astype(ids.dtype))
    count = jnp.zeros_like(ids).at[positions].add(1).at[0].set(0)
    return jnp.where(count > 0, total // jnp.maximum(count, 1), ids)


def marked(ids: Int[Array, "L"], positions: Int[Array, "M"], written: Bool[Array, "M"]) -> Bool[Array, "L"]:
    """Where `write_at` writes."""
    return write_at(jnp.zeros_like(ids), positions, jnp.ones_like(positions), written) == 1


def gumbel(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """-log(-log(u + 1e-9) + 1e-9) with u uniform in [0, 1), float32."""
    return -jnp.log(-jnp.log(jax.random.uniform(key, shape) + TINY) + TINY)


def sample(
    key: Key[Array, ""],
    logits: Float[Array, "M V"],
    correct: Int[Array, "M"],
    temperature: float = 1.0,
    disallow_correct: bool = False,
    with_gumbel: bool = False,
) -> Int[Array, "M"]:
    """One token a slot from softmax(logits / T); T = 0 is the arg max. `disallow_correct` takes 1000 from the scaled
    logit of the true token.

    `with_gumbel` draws as the reference does, by the arg max of logits with noise: V random numbers a slot, which cost
    a tenth of a small model's step on a CPU. Otherwise one number a slot draws from the same distribution.
    """
    scaled = logits / temperature if temperature > 0 else logits
    if disallow_correct:
        scaled = scaled - 1000.0 * jax.nn.one_hot(correct, logits.shape[-1])
    if temperature == 0 or with_gumbel:
        scaled = scaled + gumbel(key, logits.shape) if temperature > 0 else scaled
        return jnp.argmax(scaled, axis=-1).astype(jnp.int32)
    return _at_share(jax.random.uniform(key, (logits.shape[0],)), scaled)


def _at_share(u: Float[Array, "M"], logits: Float[Array, "M V"]) -> Int[Array, "M"]:
    """The first token up to which softmax sums to more than u, found by blocks and then within one."""
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % BLOCK))).reshape(weight.shape[0], -1, BLOCK)
    total = jnp.sum(weight, axis=-1)
    end = jnp.cumsum(total, axis=-1)
    point = u[:, None] * end[:, -1:]
    # rounding may put the point at the very end, behind which only tokens of weight 0 follow
    block = jnp.minimum(jnp.sum(end <= point, axis=-1, keepdims=True), _last(total))
    within = jnp.take_along_axis(weight, block[..., None], axis=1)[:, 0]
    rest = point - jnp.take_along_axis(end - total, block, axis=1)
    place = jnp.minimum(jnp.sum(jnp.cumsum(within, axis=-1) <= rest, axis=-1, keepdims=True), _last(within))
    return (block * BLOCK + place)[:, 0].astype(jnp.int32)


def _last(weight: Float[Array, "M N"]) -> Int[Array, "M 1"]:
    """The last place with a weight above 0."""
    return weight.shape[1] - 1 - jnp.argmax(weight[:, ::-1] > 0, axis=-1, keepdims=True)
