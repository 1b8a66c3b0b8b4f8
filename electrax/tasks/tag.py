"""A tag for each word: parts of speech, chunks, named entities."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from electrax.config import UserError
from electrax.data.examples import TaggedExample
from electrax.models.heads import OutputHead
from electrax.tasks import metrics as scorers
from electrax.tasks.base import Batch, Mean, Metrics, Params
from electrax.tasks.finetune import FinetuneTask
from electrax.tasks.tags import Scheme, constrained_decode, convert, marks_spans, span_figures, transitions_allowed


@dataclasses.dataclass(frozen=True)
class TagTask(FinetuneTask):
    """A head on the first piece of each word; rows are those of `electrax.data.words` with labels.

    With a `scheme`, in which the data marks spans, the head's `tags` are BIOES as in the reference, and what is
    predicted is given back in `scheme`. `constrained` finds the best valid sequence of them, not the best tag for each
    word. No row is longer than `max_length`.
    """

    tags: tuple[str, ...] = ()
    scheme: Scheme | None = None
    constrained: bool = True
    max_length: int = 128

    def head(self) -> OutputHead:
        return OutputHead(self.encoder, len(self.tags))

    def prepare(self, batch: Batch, keys: Key[Array, "B"]) -> Batch:
        """The share of the loss is one of each word."""
        weight = _word_weight(batch)
        share = weight if self.faithful else weight / jnp.maximum(jnp.sum(weight), 1.0)
        return super().prepare(batch, keys) | {"share": share}

    def logits(self, params: Params, prepared: Batch, train: bool = False) -> Float[Array, "B L C"]:
        ids = prepared["ids"].astype(jnp.int32)
        body, top = prepared["dropout_seed"].T if train else (None, None)
        # The reference gives every token type 1 and its tagging head no dropout. Otherwise the type is that of a single
        # text, 0: the only one seen in pretraining on packed rows.
        types = jnp.ones_like(ids) if self.faithful else jnp.zeros_like(ids)
        hidden = self.hidden(params, ids, body, types)
        return self.head().apply({"params": params["head"]}, hidden, None if self.faithful else top)

    def log_probs(self, params: Params, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Log-probabilities of the tags; they mean something at the first pieces of words."""
        return jax.nn.log_softmax(self.logits(params, {"ids": ids}))

    def loss(self, params: Params, prepared: Batch) -> tuple[Float[Array, ""], Metrics]:
        logits, weight = self.logits(params, prepared, train=True), _word_weight(prepared)
        losses = _losses(logits, prepared)
        right = jnp.argmax(logits, -1) == prepared["label"]
        found = {"label_loss": Mean.of(losses, weight), "accuracy": Mean.of(right, weight)}
        return jnp.sum(losses * prepared["share"]), found

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, params: Params, prepared: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        log_probs = self.log_probs(params, prepared["ids"])
        loss = Mean.of(_losses(log_probs, prepared), _word_weight(prepared))
        more = self.max_length - log_probs.shape[1]
        return {"loss": loss}, {
            "log_probs": jnp.pad(log_probs, ((0, 0), (0, more), (0, 0))),
            "label": jnp.pad(prepared["label"], ((0, 0), (0, more)), constant_values=-1),
            "sentence": prepared["sentence"],
        }

    def decode(self, sentences: Sequence[Float[np.ndarray, "_ C"]]) -> list[Int[np.ndarray, "_"]]:
        """The numbers of the tags of each sentence, from the log-probabilities at its words."""
        if not (self.scheme and self.constrained):
            return [np.argmax(log_probs, -1) for log_probs in sentences]
        transitions = transitions_allowed(self.tags)
        return [constrained_decode(log_probs, transitions) for log_probs in sentences]

    def written(self, numbers: Int[np.ndarray, "W"]) -> list[str]:
        """Numbers of the head's tags as the tags of a sentence of the data."""
        tags = [self.tags[number] for number in numbers]
        return convert(tags, self.scheme) if self.scheme else tags

    def _tagged(self, arrays: dict[str, np.ndarray]) -> tuple[list[list[str]], list[list[str]]]:
        """True and predicted tags of each sentence, its rows put together."""
        at = arrays["label"] >= 0
        ends = np.flatnonzero(np.diff(np.repeat(arrays["sentence"], at.sum(1)))) + 1
        true = np.split(arrays["label"][at], ends)
        predicted = self.decode(np.split(arrays["log_probs"][at], ends))
        return [self.written(numbers) for numbers in true], [self.written(numbers) for numbers in predicted]

    def summarize(self, means: dict[str, float], arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """`accuracy` word by word, and `precision`, `recall` and `f1` of spans where there are some, else the tags'
        `macro_f1`."""
        if not self.scheme:
            predicted, true = _numbers(arrays)
            return means | {
                "accuracy": scorers.accuracy(predicted, true),
                "macro_f1": scorers.macro_f1(predicted, true),
            }
        figures = span_figures(*self._tagged(arrays))._asdict()
        return means | {name: figures[name] for name in ("precision", "recall", "f1", "accuracy")}

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("f1", "precision", "recall", "accuracy", "loss") if self.scheme else ("accuracy", "macro_f1", "loss")

    def tables(self, arrays: dict[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
        """Precision, recall, F1 and support of every type of span; or of every tag that is predicted or true, and how
        often each was taken for each."""
        if self.scheme:
            by_type = span_figures(*self._tagged(arrays)).by_type
            names = ("precision", "recall", "f1", "support")
            rows = [{"type": kind} | dict(zip(names, row, strict=True)) for kind, row in by_type.items()]
            return {"by_type": rows}
        counts = scorers.confusion(*_numbers(arrays), len(self.tags))
        occurring = np.flatnonzero(counts.sum(0) + counts.sum(1))
        tags, counts = [self.tags[number] for number in occurring], counts[np.ix_(occurring, occurring)]
        by_tag = scorers.figures_of_each("tag", tags, scorers.per_class(counts))
        return {"by_tag": by_tag, "confusion": scorers.confusion_table("tag", tags, counts)}

    def diagnose(self, figures: dict[str, float], arrays: dict[str, np.ndarray]) -> list[str]:
        """What did not train, in words; empty where it did."""
        predicted, true = (np.unique(numbers) for numbers in _numbers(arrays))
        if len(predicted) == 1 and len(true) > 1:
            return [f"it is stuck at one tag: every word gets {self.tags[int(predicted[0])]!r}"]
        return []


def _word_weight(batch: Batch) -> Float[Array, "B L"]:
    """1 at the first pieces of words in rows that count."""
    return (batch["label"] >= 0) * batch["weight"][:, None]


def _losses(logits: Float[Array, "B L C"], prepared: Batch) -> Float[Array, "B L"]:
    """Cross entropy, of no meaning where there is no word."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(prepared["label"], 0))


def _numbers(arrays: dict[str, np.ndarray]) -> tuple[Int[np.ndarray, "W"], Int[np.ndarray, "W"]]:
    """The likeliest and the true tag of every word."""
    at = arrays["label"] >= 0
    return np.argmax(arrays["log_probs"][at], -1), arrays["label"][at]


# -- labels -----------------------------------------------------------------------------------------------------------


def tag_set(sentences: Iterable[Sequence[str]], scheme: Scheme | None) -> tuple[str, ...]:
    """The tags a head needs for sentences that are tagged so, sorted: those that occur, or with a scheme all of BIOES
    for every type of span, so that a span of any length can be said."""
    found = {tag for tags in sentences for tag in tags}
    if not scheme:
        return tuple(sorted(found))
    kinds = {tag.partition("-")[2] for tag in found if tag != "O"}
    return tuple(sorted({"O"} | {f"{prefix}-{kind}" if kind else prefix for prefix in "BIES" for kind in kinds}))


def label_words(examples: Iterable[TaggedExample], tags: Sequence[str], scheme: Scheme | None) -> list[list[int]]:
    """The number in `tags` of every word's tag, which with a scheme is BIOES.

    Raises UserError for a tag that is none of them, and for an example without tags.
    """
    numbers = {tag: number for number, tag in enumerate(tags)}
    labels = []
    for example in examples:
        if example.tags is None:
            raise UserError(f"{example.where}: expected a tag for every word, found none")
        written = convert(example.tags, "BIOES") if scheme and marks_spans(example.tags) else example.tags
        for place, tag in enumerate(written):
            if tag not in numbers:
                known = ", ".join(tags[:20]) + (", …" if len(tags) > 20 else "")
                raise UserError(
                    f"{example.where}: word {place + 1} has the tag {example.tags[place]!r}, expected one of {known}"
                )
        labels.append([numbers[tag] for tag in written])
    return labels
