"""Questions as windows: `[CLS] question [SEP] part of the context [SEP]`, overlapping where the context is long."""

import itertools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from electrax.config import UserError
from electrax.data.encoded import TokenRows, kept
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
    keep: bool = False,
) -> Windows:
    """Windows of at most `max_length` tokens, each `doc_stride` tokens of the context after the one before it; of a
    question, `max_query` tokens are kept. A question whose first answer meets no token is bad. With `keep` they come
    from the user's cache where the same were made before.

    Every question has a window, even without a token in its context. (Reference: `QATask.featurize`.)
    """
    _check(max_length, doc_stride, max_query)
    once = kept if keep else _made
    texts = list(dict.fromkeys(example.context for example in examples))
    encoded = once(lambda: _encode(tokenizer, texts), "contexts", tokenizer.sha256, texts)
    contexts = dict(zip(texts, _parts(encoded), strict=True))
    rows = once(
        lambda: _lay_out(tokenizer, examples, contexts, max_length, doc_stride, max_query),
        *("windows", tokenizer.sha256, max_length, doc_stride, max_query, texts, _content(examples, texts)),
    )
    numbers, question = np.unique(rows.fields["question"], return_inverse=True)
    good = tuple(examples[number] for number in numbers)
    return Windows(
        rows.with_fields(question=question.astype(np.int32)),
        good,
        tuple(contexts[example.context][1] for example in good),
        tuple(_bad(examples[number]) for number in np.setdiff1d(np.arange(len(examples)), numbers)),
    )


def _made(build: Callable[[], TokenRows], *_: object) -> TokenRows:
    return build()


def _content(examples: Sequence[QuestionExample], contexts: Sequence[str]) -> list[list]:
    """All that decides the windows of those questions on those contexts."""
    number = {context: i for i, context in enumerate(contexts)}
    return [
        [e.question, number[e.context], e.impossible, *((answer.text, answer.start) for answer in e.answers[:1])]
        for e in examples
    ]


def _bad(example: QuestionExample) -> BadRow:
    message = f"expected an answer that holds a word, found {short(example.answers[0].text)}"
    return BadRow(example.where, "answer", message)


def _encode(tokenizer: Tokenizer, contexts: Sequence[str]) -> TokenRows:
    """Contexts with the characters of their tokens, in the token arrays `from` and `to`."""
    ids, spans = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
    for context in contexts:
        some, places = encode_context(tokenizer, context)
        ids.append(some)
        spans.append(places)
    first, last = np.concatenate(spans).T
    starts = np.cumsum([len(some) for some in ids]).astype(np.int64)
    return TokenRows(starts, {"ids": np.concatenate(ids), "from": first, "to": last}, {})


def _parts(contexts: TokenRows) -> list[tuple[Int32[np.ndarray, "_"], Spans]]:
    """What `encode_context` gave for each."""
    spans = np.stack([contexts.tokens["from"], contexts.tokens["to"]], axis=1)
    return [(contexts.tokens["ids"][a:b], spans[a:b]) for a, b in itertools.pairwise(contexts.starts)]


def _lay_out(
    tokenizer: Tokenizer,
    examples: Sequence[QuestionExample],
    contexts: dict[str, tuple[Int32[np.ndarray, "_"], Spans]],
    max_length: int,
    doc_stride: int,
    max_query: int,
) -> TokenRows:
    """The rows of `Windows`, with `question` counted among all examples; a bad one has none."""
    queries = tokenizer.encode_batch([example.question for example in examples])
    windows: list[np.ndarray] = []
    fields: list[tuple[int, ...]] = []
    for number, (example, query) in enumerate(zip(examples, queries, strict=True)):
        ids, spans = contexts[example.context]
        answer = _answer_tokens(example, spans)
        if answer is None:
            continue
        head = [tokenizer.cls_id, *query[:max_query], tokenizer.sep_id]
        room = max_length - len(head) - 1
        for start in window_starts(len(ids), room, doc_stride):
            some = ids[start : start + room]
            windows.append(np.concatenate([head, some, [tokenizer.sep_id]], dtype=np.int32))
            first, last = answer
            holds = start <= first and last < start + len(some)
            target = (first - start + len(head), last - start + len(head)) if holds else (0, 0)
            fields.append((number, *target, example.impossible, len(head), start))
    return _rows(windows, fields)


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
        limits = [*(start for start, _ in offsets), len(context)][1:]
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
