"""Questions as windows: `[CLS] question [SEP] part of the context [SEP]`, overlapping where the context is long."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from electrax.config import UserError
from electrax.data.encoded import TokenRows
from electrax.data.examples import BadRow, QuestionExample, short
from electrax.data.tokenizer import Tokenizer

Spans = Int32[np.ndarray, "_ 2"]  # characters [start, end) of each token in its text


@dataclass(frozen=True)
class Windows:
    """N windows of Q questions, those of a question next to each other and from left to right.

    The fields of `rows`: `question`; `start` and `end`, the first and last token of the question's first answer, both
    0 where the window does not hold all of it; `impossible`, float32, of the whole question; `offset`, at which token
    the context begins in the row; `document`, which token of the context that is.
    """

    rows: TokenRows
    examples: tuple[QuestionExample, ...]  # Q; those given without the bad ones
    spans: tuple[Spans, ...]  # Q; of all tokens of the context
    bad: tuple[BadRow, ...]

    def parts(self) -> list[slice]:
        """The rows of each question."""
        bounds = np.searchsorted(self.rows.fields["question"], np.arange(len(self.examples) + 1))
        return [slice(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def sizes(self, part: slice) -> Int[np.ndarray, " W"]:
        """How many tokens of the context those rows hold."""
        return self.rows.lengths[part] - self.rows.fields["offset"][part] - 1


def make_windows(
    tokenizer: Tokenizer,
    examples: Sequence[QuestionExample],
    max_length: int,
    doc_stride: int = 128,
    max_query: int = 64,
) -> Windows:
    """Windows of at most `max_length` tokens, each `doc_stride` tokens of the context after the one before it; of a
    question, `max_query` tokens are kept. A question whose first answer meets no token is bad.

    Every question has a window, even without a token in its context. (Reference: `QATask.featurize`.)
    """
    _check(max_length, doc_stride, max_query)
    queries = tokenizer.encode_batch([example.question for example in examples])
    contexts: dict[str, tuple[Int32[np.ndarray, "_"], Spans]] = {}
    windows: list[np.ndarray] = []
    fields: list[tuple[int, ...]] = []
    kept, bad = [], []
    for example, query in zip(examples, queries, strict=True):
        if example.context not in contexts:
            contexts[example.context] = encode_context(tokenizer, example.context)
        ids, spans = contexts[example.context]
        answer = _answer_tokens(example, spans)
        if answer is None:
            message = f"expected an answer that holds a word, found {short(example.answers[0].text)}"
            bad.append(BadRow(example.where, "answer", message))
            continue
        head = [tokenizer.cls_id, *query[:max_query], tokenizer.sep_id]
        room = max_length - len(head) - 1
        for start in window_starts(len(ids), room, doc_stride):
            some = ids[start : start + room]
            windows.append(np.concatenate([head, some, [tokenizer.sep_id]], dtype=np.int32))
            first, last = answer
            holds = start <= first and last < start + len(some)
            target = (first - start + len(head), last - start + len(head)) if holds else (0, 0)
            fields.append((len(kept), *target, example.impossible, len(head), start))
        kept.append(example)
    rows = _rows(windows, fields)
    return Windows(rows, tuple(kept), tuple(contexts[example.context][1] for example in kept), tuple(bad))


def _check(max_length: int, doc_stride: int, max_query: int) -> None:
    if doc_stride < 1 or max_query < 1:
        raise UserError(f"doc_stride and max_query must be at least 1, not {doc_stride} and {max_query}")
    if max_length < max_query + 4:
        raise UserError(
            f"max_length is {max_length}, but must be at least {max_query + 4}: max_query {max_query}, "
            "[CLS], two [SEP] and a token of the context"
        )


def _rows(windows: list[np.ndarray], fields: list[tuple[int, ...]]) -> TokenRows:
    starts = np.cumsum([0, *map(len, windows)]).astype(np.int64)
    names = ("question", "start", "end", "impossible", "offset", "document")
    columns = dict(zip(names, np.array(fields, np.int32).reshape(-1, len(names)).T, strict=True))
    columns["impossible"] = columns["impossible"].astype(np.float32)
    return TokenRows(starts, {"ids": np.concatenate([np.zeros(0, np.int32), *windows])}, columns)


def encode_context(tokenizer: Tokenizer, context: str) -> tuple[Int32[np.ndarray, "_"], Spans]:
    """Token ids and their characters. Accents of their own, which BERT's tokenizer drops, belong to the token before
    them."""
    ids, offsets = tokenizer.encode(context)
    if not context.isascii():
        limits = [start for start, _ in offsets[1:]] + [len(context)]
        offsets = [
            (start, _with_accents(context, end, limit)) for (start, end), limit in zip(offsets, limits, strict=True)
        ]
    return np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)


def _with_accents(text: str, end: int, limit: int) -> int:
    while end < limit and unicodedata.category(text[end]) == "Mn":
        end += 1
    return end


def _answer_tokens(example: QuestionExample, spans: Spans) -> tuple[int, int] | None:
    """The first and last token that overlap the first answer; (-1, -1), in no window, where there is none to find."""
    if example.impossible or not example.answers:
        return -1, -1
    answer = example.answers[0]
    start = np.maximum(spans[:, 0], answer.start)
    end = np.minimum(spans[:, 1], answer.start + len(answer.text))
    overlap = np.flatnonzero(start < end)
    return (int(overlap[0]), int(overlap[-1])) if len(overlap) else None


def window_starts(tokens: int, room: int, doc_stride: int) -> list[int]:
    """At which tokens of the context the windows begin: until one reaches the end, and none skips a token."""
    starts = [0]
    while starts[-1] + room < tokens:
        starts.append(starts[-1] + min(room, doc_stride))
    return starts


def max_context(starts: Int[np.ndarray, " W"], sizes: Int[np.ndarray, " W"]) -> Int[np.ndarray, " T"]:
    """For each token of a context the window that shows most around it: the lesser of the tokens left and right of it,
    plus a hundredth of the window's size; the first of equals (BERT's `_check_is_max_context`)."""
    tokens = np.arange((starts + sizes).max())
    left, right = tokens[None] - starts[:, None], (starts + sizes - 1)[:, None] - tokens[None]
    nearer = np.minimum(left, right)
    return np.argmax(np.where(nearer >= 0, nearer + 0.01 * sizes[:, None], -1.0), axis=0)
