"""A pretrained model as an object: encode, detect, fill, classify."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.inference.batching import compiled, pad, padded_length, run_by_length, warm_up
from electrax.inference.template import TemplateClassifier
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.generator import Generator, GeneratorKind
from electrax.models.masks import one_way_mask, padding_mask
from electrax.tasks.base import Params
from electrax.tasks.template import TemplateTask

POOLINGS = ("mean", "cls")


class Token(NamedTuple):
    """A token, its characters [start, end) in the text, and the probability that it replaced another."""

    piece: str
    start: int
    end: int
    probability: float


class Candidate(NamedTuple):
    """What a masked-out token may have been."""

    piece: str
    probability: float


class PretrainedModel:
    """The towers of a pretraining run with their tokenizer. `discriminator` is None of a language model alone,
    `generator` where it has two towers; `detects` is false where the discriminator's logits alone say nothing
    (Electric)."""

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer,
        generator: EncoderConfig | None,
        discriminator: EncoderConfig | None,
        max_length: int,
        detects: bool = True,
        generator_kind: GeneratorKind = "masked",
    ):
        self.params, self.tokenizer, self.max_length = params, tokenizer, max_length
        self.generator, self.discriminator, self._detects = generator, discriminator, detects
        self.generator_kind = generator_kind
        self._main = discriminator or generator  # the tower that reads texts
        tower = "generator" if discriminator is None else "discriminator"
        encode = functools.partial(_encode, self._main, tower, self.reads_one_way)
        self._encode = compiled(encode)
        self._pool = {name: compiled(functools.partial(_pool, encode, name)) for name in POOLINGS}
        self._detect = jax.jit(functools.partial(_detect, discriminator))
        self._fill = jax.jit(functools.partial(_fill, generator, generator_kind))

    @property
    def reads_one_way(self) -> bool:
        """Whether the main tower is a causal LM, whose state at a token says nothing of what stands behind."""
        return self.discriminator is None and self.generator_kind == "causal"

    def encode(
        self, texts: Sequence[str], pooling: str | None = None, truncate: bool = False
    ) -> Float[np.ndarray, "B *L D"]:
        """Last hidden states of the main tower [B, L, D], float32, for `[CLS] text [SEP]`; zeros beyond a text's end.

        With the `pooling` mean or cls one vector a text [B, D], which does not depend on the other texts: the mean over
        all of its tokens, [CLS] and [SEP] too, or that of [CLS]. A text of more than `max_length` tokens is a
        UserError, or cut with `truncate`.
        """
        rows = self._rows("encode", texts, truncate)
        self._check_pooling(pooling)
        if pooling is not None:
            return self._pooled(rows, pooling)
        if not rows:
            raise UserError("encode: expected at least one text")
        out = np.zeros((len(rows), max(map(len, rows)), self._main.width), np.float32)
        for numbers, hidden in self._run(None, rows):
            length = min(out.shape[1], hidden.shape[1])
            out[numbers, :length] = hidden[:, :length]
        return out

    def _pooled(self, rows: list[list[int]], pooling: str) -> Float[np.ndarray, "B D"]:
        out = np.zeros((len(rows), self._main.width), np.float32)
        for numbers, vectors in self._run(pooling, rows):
            out[numbers] = vectors
        return out

    def warm_up(self, pooling: str | None = None, longest: int | None = None) -> int:
        """Compiles what `encode` needs with this pooling for texts of up to `longest` tokens (None: of any length), so
        that no later call does; returns how many programs these are. Seconds for each, less where they are in JAX's
        compilation cache."""
        self._check_pooling(pooling)
        return warm_up(self._forward(pooling), 1, self.max_length, longest)

    def detect(self, text: str) -> list[Token]:
        """Each token of the text with the probability that it was replaced."""
        self._check_detects("detect")
        ids, offsets = self.tokenizer.encode(text)
        row = self._row(ids)
        scores = np.asarray(self._detect(self.params, self._padded(row), self.tokenizer.pad_id))[0]
        probabilities = 1 / (1 + np.exp(-scores[1 : len(ids) + 1].astype(np.float64)))
        pieces = self.tokenizer.pieces(ids)
        return [Token(p, *span, float(q)) for p, span, q in zip(pieces, offsets, probabilities, strict=True)]

    def fill(self, text: str, candidates: int = 5) -> list[list[Candidate]]:
        """For each mask token in the text (its name in the vocabulary, as "[MASK]"), the likeliest tokens."""
        if self.generator_kind in ("two_tower", "causal"):
            name = self.generator_kind.replace("_", "-")
            raise UserError(f"fill: a {name} generator predicts no masked-out tokens")
        if self.generator is None:
            raise UserError("fill: this model has no generator")
        ids, _ = self.tokenizer.encode(text, allow_special=True)
        row = self._row(ids)
        slots = np.flatnonzero(np.asarray(row) == self.tokenizer.mask_id)
        if not len(slots):
            name = self.tokenizer.pieces([self.tokenizer.mask_id])[0]
            raise UserError(f"fill: the text has no {name}")
        logits = np.asarray(self._fill(self.params, self._padded(row), self.tokenizer.pad_id))[0, slots]
        filled = []
        for row_logits in logits.astype(np.float64):
            weights = np.exp(row_logits - row_logits.max())
            best = np.argsort(-weights)[:candidates]
            pieces = self.tokenizer.pieces(best)
            filled.append([Candidate(p, float(w)) for p, w in zip(pieces, weights[best] / weights.sum(), strict=True)])
        return filled

    def classify(
        self,
        texts: Sequence[str | tuple[str, str]],
        labels: Sequence[str] | Mapping[str, str],
        template: str = "{text} It was {label}.",
    ) -> list[dict[str, Any]]:
        """Which label's word looks most original in the template, without any training (Xia et al., 2022).

        `labels` are the words, or class -> word or words. A template for pairs has {text2} too. For each text `label`
        with its `probability` and the `probabilities` of all. A text that is too long is cut, never the template.
        """
        self._check_detects("classify")
        if isinstance(texts, str) or isinstance(labels, str):
            raise UserError("classify: expected lists of texts and of labels, not one text or label")
        words = tuple(labels.values()) if isinstance(labels, Mapping) else tuple(labels)
        pad_id, sep_id = self.tokenizer.pad_id, self.tokenizer.sep_id
        task = TemplateTask(self.discriminator, pad_id, sep_id, classes=tuple(labels))
        return TemplateClassifier(self.params, self.tokenizer, task, self.max_length, words, template).predict(texts)

    def _check_pooling(self, pooling: str | None) -> None:
        if pooling is not None and pooling not in POOLINGS:
            raise UserError(f"encode: expected the pooling {' or '.join(POOLINGS)}, not {pooling!r}")

    def _check_detects(self, what: str) -> None:
        if self.discriminator is None:
            raise UserError(f"{what}: this model was trained with masked LM alone and has no discriminator")
        if "head" not in self.params["discriminator"]:
            raise UserError(f"{what}: this model is an encoder alone, without the discriminator's head")
        if not self._detects:
            raise UserError(f"{what}: an Electric discriminator's probabilities need its generator's; use encode")

    def _rows(self, what: str, texts: Sequence[str], truncate: bool) -> list[list[int]]:
        if isinstance(texts, str):
            raise UserError(f"{what}: expected a list of texts, not one text")
        return [self._row(ids, truncate) for ids in self.tokenizer.encode_batch(list(texts))]

    def _run(self, pooling: str | None, rows: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return run_by_length(self._forward(pooling), [(rows, self.tokenizer.pad_id)], self.max_length)

    def _forward(self, pooling: str | None) -> Callable[[np.ndarray], jax.Array]:
        program = self._encode if pooling is None else self._pool[pooling]
        return lambda ids: program(self.params, ids, self.tokenizer.pad_id)

    def _row(self, ids: list[int], truncate: bool = False) -> list[int]:
        room = self.max_length - 2
        if len(ids) > room and not truncate:
            raise UserError(
                f"the text has {len(ids)} tokens, but the model takes {room}; shorten it or pass truncate=True"
            )
        return [self.tokenizer.cls_id, *ids[:room], self.tokenizer.sep_id]

    def _padded(self, row: list[int]) -> Int[np.ndarray, "1 L"]:
        length = min(self.max_length, padded_length(len(row)))
        return pad([row], np.zeros(1, np.int64), length, self.tokenizer.pad_id)


def _encode(config: EncoderConfig, tower: str, one_way: bool, params: Params, ids, pad_id):
    embedded, mask = Embeddings(config).apply({"params": params["embeddings"]}, ids), padding_mask(ids != pad_id)
    mask = one_way_mask(mask) if one_way else mask
    hidden = Encoder(config).apply({"params": params[tower]["encoder"]}, embedded, mask)
    return jnp.where((ids != pad_id)[..., None], hidden.astype(jnp.float32), 0.0)


def _pool(encode: Callable, pooling: str, params: Params, ids, pad_id):
    hidden = encode(params, ids, pad_id)
    if pooling == "cls":
        return hidden[:, 0]
    return jnp.sum(hidden, axis=1) / jnp.maximum(jnp.sum(ids != pad_id, axis=1), 1)[:, None]


def _detect(config: EncoderConfig, params: Params, ids, pad_id):
    embedded = Embeddings(config).apply({"params": params["embeddings"]}, ids)
    return Discriminator(config).apply({"params": params["discriminator"]}, embedded, padding_mask(ids != pad_id))


def _fill(config: EncoderConfig, kind: GeneratorKind, params: Params, ids, pad_id):
    table = params.get("generator_embeddings", params["embeddings"])
    embedded = Embeddings(config).apply({"params": table}, ids)
    mask = padding_mask(ids != pad_id)
    return Generator(config, kind).apply({"params": params["generator"]}, embedded, table["word"], mask)
