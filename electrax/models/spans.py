"""Heads that find a span of the context: where an answer starts, where it ends, and whether there is none.

Neither drops units of its own: the reference's head (`qa_tasks.py`) and Transformers' ElectraForQuestionAnswering both
read the encoder's last hidden states as they are.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from electrax.models.encoder import EncoderConfig, gelu
from electrax.models.linear import Linear

SpanStyle = Literal["joint", "plain"]
HIDDEN_WIDTH = 512  # of the reference's qa_hidden and of its classifier, in every size of the model
WITHHELD = -1000.0  # added to the logits of tokens that cannot begin or end an answer

Mask = Bool[Array, "B L"]  # [CLS] and the second segment: what may begin or end an answer


class SpanLogits(NamedTuple):
    """`null` is the higher, the less there is an answer in the window."""

    start: Float[Array, "B L"]
    end: Float[Array, "B L"]
    null: Float[Array, " B"]


class Beams(NamedTuple):
    """The K best starts of each row and K best ends for each of them. What lies beyond the row scores -inf."""

    start: Int[Array, "B K"]
    end: Int[Array, "B K K"]
    score: Float[Array, "B K K"]  # of the span
    null: Float[Array, " B"]


class PairScore(nn.Module):
    """Two layers on each pair of states, dense1(gelu(dense512([a; b]))), float32. The first layer is applied to a and
    to b by itself, and never to a pair."""

    config: EncoderConfig

    def setup(self):
        c = self.config
        limit = (6.0 / (2 * c.width + HIDDEN_WIDTH)) ** 0.5  # glorot_uniform of a layer on [a; b]
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)  # noqa: E731
        self.first = Linear(HIDDEN_WIDTH, use_bias=False, dtype=c.dtype, kernel_init=init)
        self.second = Linear(HIDDEN_WIDTH, dtype=c.dtype, kernel_init=init)
        self.output = Linear(1, dtype=jnp.float32, kernel_init=nn.initializers.glorot_uniform())

    def __call__(self, a: Float[Array, "B K D"], b: Float[Array, "B L D"]) -> Float[Array, "B K L"]:
        first, second = self.first(a), self.second(b)

        def scores(one: Float[Array, "B H"]) -> Float[Array, "B L"]:
            return self.output(gelu(one[:, None] + second))[..., 0]

        if first.shape[1] == 1:
            return scores(first[:, 0])[:, None]
        # one after the other: all K at once would not fit into a cache, nor with long rows into memory
        return jnp.moveaxis(jax.lax.map(scores, jnp.moveaxis(first, 1, 0)), 0, 1)


class JointSpanHead(nn.Module):
    """The paper's head: the end depends on the start, and a classifier on [CLS] and on where the start may be says
    whether there is an answer."""

    config: EncoderConfig

    def setup(self):
        self.start = Linear(1, dtype=jnp.float32, kernel_init=nn.initializers.glorot_uniform())
        self.end = PairScore(self.config)
        self.answerable = PairScore(self.config)

    def __call__(
        self, hidden: Float[Array, "B L D"], mask: Mask | None = None, start: Int[Array, " B"] | None = None
    ) -> SpanLogits:
        """The end given `start`, in training the true one; without it given [CLS]. Without `mask` any token may be."""
        start = jnp.zeros(hidden.shape[0], jnp.int32) if start is None else start
        logits = self._start(hidden, mask)
        end = self.end(_states(hidden, start[:, None]), hidden)[:, 0]
        return SpanLogits(logits, _withhold(end, mask), self._null(hidden, logits))

    def beams(self, hidden: Float[Array, "B L D"], mask: Mask, beam: int) -> Beams:
        """Log-probabilities: of the start, plus of the end given the start."""
        logits = self._start(hidden, mask)
        start_score, start = _top(jax.nn.log_softmax(logits), beam)
        ends = _withhold(self.end(_states(hidden, start), hidden), mask[:, None])
        end_score, end = _top(jax.nn.log_softmax(ends), beam)
        return Beams(start, end, start_score[..., None] + end_score, self._null(hidden, logits))

    def _start(self, hidden: Float[Array, "B L D"], mask: Mask | None) -> Float[Array, "B L"]:
        return _withhold(self.start(hidden)[..., 0], mask)

    def _null(self, hidden: Float[Array, "B L D"], start: Float[Array, "B L"]) -> Float[Array, " B"]:
        likely = jnp.einsum("bl,bld->bd", jax.nn.softmax(start), hidden.astype(jnp.float32))
        return self.answerable(hidden[:, :1], likely[:, None])[:, 0, 0]


class PlainSpanHead(nn.Module):
    """Two logits a token, for start and end, as in Transformers' ElectraForQuestionAnswering. The score of "no answer"
    is that of the span [CLS]."""

    config: EncoderConfig

    def setup(self):
        self.output = Linear(2, dtype=jnp.float32, kernel_init=nn.initializers.glorot_uniform())

    def __call__(
        self, hidden: Float[Array, "B L D"], mask: Mask | None = None, start: Int[Array, " B"] | None = None
    ) -> SpanLogits:
        """The end does not depend on `start`. Without `mask` any token may be."""
        first, last = (_withhold(logits, mask) for logits in jnp.moveaxis(self.output(hidden), -1, 0))
        return SpanLogits(first, last, first[:, 0] + last[:, 0])

    def beams(self, hidden: Float[Array, "B L D"], mask: Mask, beam: int) -> Beams:
        """Logits: of the start, plus of the end."""
        logits = self(hidden, mask)
        (start_score, start), (end_score, end) = _top(logits.start, beam), _top(logits.end, beam)
        score = start_score[:, :, None] + end_score[:, None]
        return Beams(start, jnp.broadcast_to(end[:, None], score.shape), score, logits.null)


def _withhold(logits: Float[Array, "*rows L"], mask: Bool[Array, "*rows_or_1 L"] | None) -> Float[Array, "*rows L"]:
    return logits if mask is None else logits + jnp.where(mask, 0.0, WITHHELD)


def _states(hidden: Float[Array, "B L D"], places: Int[Array, "B K"]) -> Float[Array, "B K D"]:
    return jnp.take_along_axis(hidden, places[..., None], axis=1, mode="clip")


def _top(scores: Float[Array, "*rows L"], beam: int) -> tuple[Float[Array, "*rows K"], Int[Array, "*rows K"]]:
    """The `beam` best and their places, beyond the row where it is shorter than that."""
    missing = max(0, beam - scores.shape[-1])
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, missing)]
    best, places = jax.lax.top_k(jnp.pad(scores, padding, constant_values=-jnp.inf), beam)
    return best, places
