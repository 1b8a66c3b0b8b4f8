"""A pretrained model as an object: encode, detect, fill."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.generator import Generator
from electrax.models.masks import padding_mask
from electrax.tasks.base import Params

LENGTH_MULTIPLE, ROWS = 32, 16  # texts are padded to few shapes, so that few are compiled


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
    """The towers of a pretraining run with their tokenizer. `discriminator` is None after plain masked LM, `generator`
    where it has two towers; `detects` is false where the discriminator's logits alone say nothing (Electric)."""

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer,
        generator: EncoderConfig | None,
        discriminator: EncoderConfig | None,
        max_length: int,
        detects: bool = True,
    ):
        self.params, self.tokenizer, self.max_length = params, tokenizer, max_length
        self.generator, self.discriminator, self._detects = generator, discriminator, detects
        self._encode = jax.jit(functools.partial(_encode, discriminator or generator, discriminator is not None))
        self._detect = jax.jit(functools.partial(_detect, discriminator))
        self._fill = jax.jit(functools.partial(_fill, generator))

    def encode(self, texts: Sequence[str], truncate: bool = False) -> Float[np.ndarray, "B L D"]:
        """Last hidden states of the main tower, float32, for `[CLS] text [SEP]`; zeros beyond a text's end.

        A text of more than `max_length` tokens is a UserError, or cut with `truncate`.
        """
        rows = [self._row(self._ids(text), truncate) for text in texts]
        if not rows:
            raise UserError("encode: expected at least one text")
        padded = self._padded(rows)
        parts = []
        for start in range(0, len(padded), ROWS):
            some = padded[start : start + ROWS]
            whole = np.pad(
                some, ((0, min(ROWS, _power(len(padded))) - len(some)), (0, 0)), constant_values=self.tokenizer.pad_id
            )
            parts.append(np.asarray(self._encode(self.params, whole, self.tokenizer.pad_id))[: len(some)])
        return np.concatenate(parts)[:, : max(map(len, rows))]

    def detect(self, text: str) -> list[Token]:
        """Each token of the text with the probability that it was replaced."""
        if self.discriminator is None:
            raise UserError("detect: this model was trained with masked LM alone and has no discriminator")
        if not self._detects:
            raise UserError("detect: an Electric discriminator's probabilities need its generator's; use encode")
        ids, offsets = self.tokenizer.encode(text)
        row = self._row(ids)
        scores = np.asarray(self._detect(self.params, self._padded([row]), self.tokenizer.pad_id))[0]
        probabilities = 1 / (1 + np.exp(-scores[1 : len(ids) + 1].astype(np.float64)))
        pieces = self.tokenizer.pieces(ids)
        return [Token(p, *span, float(q)) for p, span, q in zip(pieces, offsets, probabilities, strict=True)]

    def fill(self, text: str, candidates: int = 5) -> list[list[Candidate]]:
        """For each mask token in the text (its name in the vocabulary, as "[MASK]"), the likeliest tokens."""
        if self.generator is None:
            raise UserError("fill: a two-tower generator predicts no masked-out tokens")
        ids, _ = self.tokenizer.encode(text, allow_special=True)
        row = self._row(ids)
        slots = np.flatnonzero(np.asarray(row) == self.tokenizer.mask_id)
        if not len(slots):
            name = self.tokenizer.pieces([self.tokenizer.mask_id])[0]
            raise UserError(f"fill: the text has no {name}")
        logits = np.asarray(self._fill(self.params, self._padded([row]), self.tokenizer.pad_id))[0, slots]
        filled = []
        for row_logits in logits.astype(np.float64):
            weights = np.exp(row_logits - row_logits.max())
            best = np.argsort(-weights)[:candidates]
            pieces = self.tokenizer.pieces(best)
            filled.append([Candidate(p, float(w)) for p, w in zip(pieces, weights[best] / weights.sum(), strict=True)])
        return filled

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)[0]

    def _row(self, ids: list[int], truncate: bool = False) -> list[int]:
        room = self.max_length - 2
        if len(ids) > room and not truncate:
            raise UserError(
                f"the text has {len(ids)} tokens, but the model takes {room}; shorten it or pass truncate=True"
            )
        return [self.tokenizer.cls_id, *ids[:room], self.tokenizer.sep_id]

    def _padded(self, rows: list[list[int]]) -> Int[np.ndarray, "B L"]:
        longest = max(map(len, rows))
        length = min(self.max_length, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        padded = np.full((len(rows), length), self.tokenizer.pad_id, np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def _encode(config: EncoderConfig, detects: bool, params: Params, ids, pad_id):
    tower = params["discriminator" if detects else "generator"]
    embedded = Embeddings(config).apply({"params": params["embeddings"]}, ids)
    hidden = Encoder(config).apply({"params": tower["encoder"]}, embedded, padding_mask(ids != pad_id))
    return jnp.where((ids != pad_id)[..., None], hidden.astype(jnp.float32), 0.0)


def _detect(config: EncoderConfig, params: Params, ids, pad_id):
    embedded = Embeddings(config).apply({"params": params["embeddings"]}, ids)
    return Discriminator(config).apply({"params": params["discriminator"]}, embedded, padding_mask(ids != pad_id))


def _fill(config: EncoderConfig, params: Params, ids, pad_id):
    table = params.get("generator_embeddings", params["embeddings"])
    embedded = Embeddings(config).apply({"params": table}, ids)
    mask = padding_mask(ids != pad_id)
    return Generator(config).apply({"params": params["generator"]}, embedded, table["word"], mask)
