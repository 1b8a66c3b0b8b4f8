"""Tags that mark spans (IO, IOB1, IOB2, BIOES): reading, writing, decoding and scoring them."""

import collections
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from electrax.config import UserError

Scheme = Literal["IO", "IOB1", "IOB2", "BIOES"]
SCHEMES: tuple[Scheme, ...] = ("IOB2", "BIOES", "IO", "IOB1")


class Span(NamedTuple):
    type: str
    start: int
    end: int  # exclusive


def _split(tag: str) -> tuple[str, str]:
    """`B-PER` -> ("B", "PER"); a bare `B` marks a span of the type ""."""
    prefix, _, kind = tag.partition("-")
    if prefix not in ("B", "I", "O", "E", "S") or (prefix == "O" and tag != "O"):
        raise UserError(f"tag {tag!r} marks no span: expected O, or B-, I-, E- or S- and a type")
    return prefix, kind


def marks_spans(tags: Iterable[str]) -> bool:
    """Whether every tag is O or one of B, I, E, S with or without a type; parts of speech, say, are not."""
    try:
        return all(_split(tag) for tag in tags)
    except UserError:
        return False


# -- spans and tags ---------------------------------------------------------------------------------------------------


def to_spans(tags: Sequence[str]) -> list[Span]:
    """The spans of one sentence, in order, by the rule of conlleval as seqeval completes it for E and S.

    A token goes on with a span if it has I or E, the one before it B or I, and both the same type. Any other token but
    O starts a span. So one rule reads every scheme, and invalid sequences too. Raises UserError for any other tag.
    """
    spans: list[Span] = []
    is_open = False
    for place, tag in enumerate(tags):
        prefix, kind = _split(tag)
        if is_open and prefix in "IE" and spans[-1].type == kind:
            spans[-1] = spans[-1]._replace(end=place + 1)
        elif prefix != "O":
            spans.append(Span(kind, place, place + 1))
        is_open = prefix in "BI"
    return spans


def from_spans(spans: Sequence[Span], length: int, scheme: Scheme) -> list[str]:
    """The tags of a sentence of `length` tokens with these spans, which are in order and do not overlap."""
    tags = ["O"] * length
    previous = Span("", -1, -1)
    for span in spans:
        prefixes = ["I"] * (span.end - span.start)
        follows = previous.end == span.start and previous.type == span.type
        if scheme in ("IOB2", "BIOES") or (scheme == "IOB1" and follows):
            prefixes[0] = "B"
        if scheme == "BIOES":
            prefixes[-1] = "E" if len(prefixes) > 1 else "S"
        tags[span.start : span.end] = [f"{prefix}-{span.type}" if span.type else prefix for prefix in prefixes]
        previous = span
    return tags


def convert(tags: Sequence[str], scheme: Scheme) -> list[str]:
    """The same spans in another scheme. IO cannot keep apart two spans of one type that touch."""
    return from_spans(to_spans(tags), len(tags), scheme)


def most_fitting(sentences: Sequence[Sequence[str]]) -> tuple[Scheme | None, int]:
    """The scheme in which most sentences are valid (None if the tags do not mark spans), and how many are not.

    Of several, the first of IOB2, BIOES, IO, IOB1: so IO says that there is no B at all, though IOB1 may be meant.
    """
    if not marks_spans(tag for tags in sentences for tag in tags):
        return None, 0
    fits = {scheme: sum(convert(tags, scheme) == [*tags] for tags in sentences) for scheme in SCHEMES}
    scheme = max(SCHEMES, key=lambda scheme: fits[scheme])
    return scheme, len(sentences) - fits[scheme]


# -- scores -----------------------------------------------------------------------------------------------------------


class SpanFigures(NamedTuple):
    """Shares in 0 .. 1, over all spans together. As in conlleval, a share of nothing is 0; NaN without any token."""

    precision: float
    recall: float
    f1: float
    accuracy: float  # of the tags, token by token
    by_type: dict[str, tuple[float, float, float, int]]  # precision, recall, F1, true spans; in the order of the types


def span_figures(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> SpanFigures:
    """Scores of the predicted tags of sentences, in any scheme; a span is right if type, start and end are.

    Raises ValueError where the numbers of sentences or of tokens differ.
    """
    right, guessed, support = (collections.Counter[str]() for _ in range(3))
    tokens = same = 0
    for true_tags, predicted_tags in zip(true, predicted, strict=True):
        same += sum(a == b for a, b in zip(true_tags, predicted_tags, strict=True))
        tokens += len(true_tags)
        true_spans, predicted_spans = to_spans(true_tags), to_spans(predicted_tags)
        support.update(span.type for span in true_spans)
        guessed.update(span.type for span in predicted_spans)
        right.update(span.type for span in set(true_spans) & set(predicted_spans))
    if not tokens:
        return SpanFigures(*[float("nan")] * 4, {})
    kinds = sorted(support.keys() | guessed.keys())
    by_type = {kind: (*_shares(right[kind], guessed[kind], support[kind]), support[kind]) for kind in kinds}
    return SpanFigures(*_shares(right.total(), guessed.total(), support.total()), same / tokens, by_type)


def _shares(right: int, guessed: int, support: int) -> tuple[float, float, float]:
    """Precision, recall and F1."""
    f1 = 2 * right / (guessed + support) if guessed + support else 0.0
    return right / guessed if guessed else 0.0, right / support if support else 0.0, f1


# -- decoding ---------------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """Which tag may follow which, begin a sentence and end one; indices are places in the list of tags."""

    allowed: Bool[np.ndarray, "C C"]  # from row to column
    starts: Bool[np.ndarray, "C"]
    ends: Bool[np.ndarray, "C"]


def transitions_allowed(tags: Sequence[str]) -> Transitions:
    """What a set of BIOES tags (known by an E or S) or of IOB2 tags allows; any other set allows everything.

    IOB1 has the same tags as IOB2 and is taken for it: convert it first.
    """
    count = len(tags)
    parts = [_split(tag) for tag in tags] if marks_spans(tags) else []
    prefixes = {prefix for prefix, _ in parts}
    if not prefixes & {"B", "E", "S"}:
        return Transitions(np.ones((count, count), bool), np.ones(count, bool), np.ones(count, bool))
    prefix, kind = (np.array(column) for column in zip(*parts, strict=True))
    is_open, goes_on = np.isin(prefix, ["B", "I"]), np.isin(prefix, ["I", "E"])
    must_go_on = is_open if prefixes & {"E", "S"} else np.zeros(count, bool)
    fits = is_open[:, None] & (kind[:, None] == kind[None, :])
    allowed = np.where(goes_on[None, :], fits, ~must_go_on[:, None])
    return Transitions(allowed, ~goes_on, ~must_go_on)


def constrained_decode(scores: Float[np.ndarray, "L C"], transitions: Transitions) -> Int[np.ndarray, "L"]:
    """The valid path of tags through one sentence with the greatest sum of finite scores (log-probabilities, logits).

    Viterbi. Where no path is valid, the best of those with the fewest forbidden steps.
    """
    length, count = scores.shape
    if not length:
        return np.zeros(0, np.int64)
    scores = scores.astype(np.float64)
    penalty = 1 + np.ptp(scores, axis=1).sum()  # of a forbidden step: more than any choice of tags can make up for
    step = np.where(transitions.allowed, 0, -penalty)
    best = scores[0] + np.where(transitions.starts, 0, -penalty)
    came_from = np.zeros((length, count), np.int64)
    for place in range(1, length):
        paths = best[:, None] + step
        came_from[place] = paths.argmax(0)
        best = paths.max(0) + scores[place]
    path = np.zeros(length, np.int64)
    path[-1] = np.argmax(best + np.where(transitions.ends, 0, -penalty))
    for place in range(length - 1, 0, -1):
        path[place - 1] = came_from[place, path[place]]
    return path
