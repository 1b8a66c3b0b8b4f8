"""A fine-tuned tagger as an object: words in, tags or spans out."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from electrax.config import UserError
from electrax.data.examples import check_texts
from electrax.data.tokenizer import Tokenizer
from electrax.data.words import encode_words, word_padding
from electrax.inference.batching import by_length, compiled, run, warm_up
from electrax.tasks.base import Params
from electrax.tasks.tag import TagTask
from electrax.tasks.tags import to_spans


class TaggedWord(NamedTuple):
    word: str
    tag: str
    probability: float  # that the head gives to the tag


class Entity(NamedTuple):
    """The words [start, end) of a sentence and what they are."""

    type: str
    start: int
    end: int
    text: str


class Tagger:
    """Sentences of any length; one that does not fit into `max_length` tokens is read in overlapping parts."""

    def __init__(self, params: Params, tokenizer: Tokenizer, task: TagTask, max_length: int):
        self.params, self.tokenizer, self.task, self.max_length = params, tokenizer, task, max_length
        self._forward = compiled(task.log_probs)

    def warm_up(self, longest: int | None = None) -> int:
        """Compiles what sentences of up to `longest` tokens (None: of any length) need, so that no later call does;
        returns how many programs these are."""
        return warm_up(functools.partial(self._forward, self.params), 1, self.max_length, longest)

    def tag(self, words: Sequence[str]) -> list[TaggedWord]:
        """Every word with its tag."""
        return self.tag_batch([words])[0]

    def tag_batch(self, sentences: Sequence[Sequence[str]]) -> list[list[TaggedWord]]:
        """Every word of every sentence with its tag."""
        if any(isinstance(words, str) for words in (sentences, *sentences)):
            raise UserError("tag: expected a sentence as a list of words, not as one text")
        check_texts("tag", "sentence", sentences)
        log_probs = self.log_probs(sentences)
        tagged = []
        for words, scores, numbers in zip(sentences, log_probs, self.task.decode(log_probs), strict=True):
            shares = np.exp(scores[np.arange(len(words)), numbers])
            tags = self.task.written(numbers)
            tagged.append([TaggedWord(*each) for each in zip(words, tags, shares.tolist(), strict=True)])
        return tagged

    def entities(self, words: Sequence[str]) -> list[Entity]:
        """The spans in a sentence, in order. Raises UserError for tags that mark none."""
        if not self.task.scheme:
            raise UserError("entities: the tags of this model mark no spans; use tag")
        spans = to_spans([word.tag for word in self.tag(words)])
        return [Entity(*span, " ".join(words[span.start : span.end])) for span in spans]

    def log_probs(self, sentences: Sequence[Sequence[str]]) -> list[Float[np.ndarray, "_ C"]]:
        """The log-probabilities of the task's tags at the words of each sentence."""
        rows = encode_words(self.tokenizer, sentences, self.max_length)
        starts = np.cumsum([0, *map(len, sentences)])
        out = np.zeros((starts[-1], len(self.task.tags)), np.float32)

        def one(batch: tuple[np.ndarray, int]) -> tuple[np.ndarray, np.ndarray]:
            numbers, length = batch
            # beyond max_length there are no positions
            arrays = rows.batch(numbers, min(length, self.max_length), word_padding(self.tokenizer.pad_id))
            at, places = arrays["word"] >= 0, starts[arrays["sentence"]][:, None] + arrays["word"]
            return places[at], np.asarray(self._forward(self.params, arrays["ids"]))[at]

        for places, found in run(one, by_length(rows.lengths.tolist())):
            out[places] = found
        return np.split(out, starts[1:-1]) if sentences else []
