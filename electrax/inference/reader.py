"""A fine-tuned model that answers questions from a context."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from electrax.config import UserError
from electrax.data.examples import Fault, QuestionExample, short, string_fault
from electrax.data.tokenizer import Tokenizer
from electrax.data.windows import Windows, make_windows
from electrax.inference.batching import by_length, compiled, run, warm_up
from electrax.tasks.answer import AnswerTask
from electrax.tasks.base import Params

QUESTIONS = 64  # answered together


class Candidate(NamedTuple):
    """`text` is `context[start:end]`; `probability` is that among the n best."""

    text: str
    start: int
    end: int
    score: float
    probability: float


class Answer(NamedTuple):
    """`text` is `context[start:end]`; empty, with start and end 0, where the context has no answer.

    `probability`: of the answer among the n best, or that there is none. `null_score`: the higher, the less there is an
    answer. `candidates`: the best answers if there is one, as many as were asked for.
    """

    text: str
    start: int
    end: int
    probability: float
    null_score: float
    candidates: tuple[Candidate, ...] = ()


class Reader:
    """Long contexts are read in windows, as in training."""

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer,
        task: AnswerTask,
        max_length: int,
        doc_stride: int = 128,
        max_query: int = 64,
    ):
        self.params, self.tokenizer, self.task = params, tokenizer, task
        self.max_length, self.doc_stride, self.max_query = max_length, doc_stride, max_query
        self._beams = compiled(task.beams)

    def warm_up(self) -> int:
        """Compiles what windows of any length need, so that no later call does; returns how many programs these are."""
        return warm_up(functools.partial(self._beams, self.params), 1, self.max_length, None)

    def answer(self, question: str, context: str, n_best: int = 0) -> Answer:
        """The answer, as a part of the context, with its `n_best` best candidates: different texts, best first."""
        return next(self.answer_batch([("", question, context)], n_best))[1]

    def answer_batch(self, questions: Iterable[tuple[str, str, str]], n_best: int = 0) -> Iterator[tuple[str, Answer]]:
        """(id, question, context) -> (id, answer), in order, from an iterable of any length. Raises UserError for what
        is no text, for a context without a token, and for an `n_best` of more than the model keeps."""
        for id, answer in self.answers(questions, n_best):
            if isinstance(answer, Fault):
                raise UserError(f"answer: {answer.message}")
            yield id, answer

    def answers(
        self, questions: Iterable[tuple[str, str, str]], n_best: int = 0
    ) -> Iterator[tuple[str, Answer | Fault]]:
        """As `answer_batch`, with what is wrong with a question in place of its answer."""
        if not 0 <= n_best <= self.task.n_best:
            raise UserError(f"n_best {n_best}: expected at most the {self.task.n_best} answers that the model keeps")
        questions = iter(questions)
        while some := list(itertools.islice(questions, QUESTIONS)):
            faults = [
                string_fault(question, "the question") or string_fault(context, "the context")
                for _, question, context in some
            ]
            examples = [
                QuestionExample(id, id, *(("", "") if fault else texts), ())
                for (id, *texts), fault in zip(some, faults, strict=True)
            ]
            windows = make_windows(self.tokenizer, examples, self.max_length, self.doc_stride, self.max_query)
            task = dataclasses.replace(self.task, windows=windows)
            predictions = task.predictions(self._arrays(windows))
            for found, spans, fault, (*_, context) in zip(predictions, windows.spans, faults, some, strict=True):
                if not fault and not len(spans):
                    fault = Fault("context", f"expected a context with a word, found {short(context)}")
                candidates = tuple(Candidate(**candidate) for candidate in found["n_best"][:n_best])
                yield found["id"], fault or self._answer(found)._replace(candidates=candidates)

    def _arrays(self, windows: Windows) -> dict[str, np.ndarray]:
        """The beams of all windows, in their order."""
        arrays: dict[str, np.ndarray] = {}

        def one(batch: tuple[np.ndarray, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            numbers, length = batch
            rows = windows.rows.batch(numbers, min(length, self.max_length), {"ids": self.tokenizer.pad_id})
            return numbers, jax.device_get(self._beams(self.params, rows["ids"]))

        for numbers, found in run(one, by_length(windows.rows.lengths.tolist())):
            for name, values in found.items():
                whole = arrays.setdefault(name, np.zeros((len(windows.rows), *values.shape[1:]), values.dtype))
                whole[numbers[numbers >= 0]] = values[numbers >= 0]
        return arrays

    def _answer(self, found: dict) -> Answer:
        null = found["null_score"]
        withheld = self.task.no_answer and null > self.task.null_threshold
        if withheld or not found["text"]:
            return Answer("", 0, 0, 0.5 + 0.5 * math.tanh(null / 2), null)
        return Answer(found["text"], found["start"], found["end"], found["n_best"][0]["probability"], null)
