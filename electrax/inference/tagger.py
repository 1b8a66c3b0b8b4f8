"""A fine-tuned tagger as an object: words in, tags or spans out."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.data.words import encode_words, word_padding
from electrax.inference.batching import by_length
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
        self._forward = jax.jit(task.log_probs)

    def tag(self, words: Sequence[str]) -> list[TaggedWord]:
        """Every word with its tag."""
        return self.tag_batch([words])[0]

    def tag_batch(self, sentences: Sequence[Sequence[str]]) -> list[list[TaggedWord]]:
        """Every word of every sentence with its tag."""
        if any(isinstance(words, str) for words in (sentences, *sentences)):
            raise UserError("tag: expected a sentence as a list of words, not as one text")
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
        waiting = []  # one batch runs while the next is put together
        for numbers, length in by_length(rows.lengths.tolist()):
            # beyond max_length there are no positions
            batch = rows.batch(numbers, min(length, self.max_length), word_padding(self.tokenizer.pad_id))
            places = starts[batch["sentence"]][:, None] + batch["word"]
            waiting.append((batch["word"] >= 0, places, self._forward(self.params, batch["ids"])))
            if len(waiting) > 1:
                _collect(out, *waiting.pop(0))
        for each in waiting:
            _collect(out, *each)
        return np.split(out, starts[1:-1]) if sentences else []


def _collect(out: np.ndarray, at: np.ndarray, places: np.ndarray, log_probs: jax.Array) -> None:
    out[places[at]] = np.asarray(log_probs)[at]
