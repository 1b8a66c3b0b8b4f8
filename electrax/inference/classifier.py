"""A fine-tuned classifier as an object: texts in, labels with probabilities out."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from electrax.config import UserError
from electrax.data.encoded import encode_pairs
from electrax.data.examples import check_texts
from electrax.data.tokenizer import Tokenizer
from electrax.inference.batching import compiled, run_by_length, warm_up, warn_of_cut
from electrax.tasks.base import Params
from electrax.tasks.classify import ClassifyTask


class Classifier:
    """`predict` takes what one row of the training data had: a text, a pair, or a context with its choices. `texts`:
    whether that is a text or a pair, 1 or 2; None where nothing says so."""

    def __init__(
        self, params: Params, tokenizer: Tokenizer, task: ClassifyTask, max_length: int, texts: int | None = None
    ):
        self.params, self.tokenizer, self.task, self.max_length = params, tokenizer, task, max_length
        self.texts = texts
        # each choice of a question comes as a row of its own
        self._forward = compiled(
            lambda params, ids: task.logits(params, {"ids": ids[:, None] if task.kind == "choice" else ids})
        )
        self._inputs = 1

    def warm_up(self, longest: int | None = None) -> int:
        """Compiles what rows of up to `longest` tokens (None: of any length) need, so that no later call does; returns
        how many programs these are. Seconds for each, less where they are in JAX's compilation cache."""
        return warm_up(functools.partial(self._forward, self.params), self._inputs, self.max_length, longest)

    def logits(self, rows: Sequence[tuple[str, ...]]) -> Float[np.ndarray, "N C"]:
        """The head's outputs for rows of one or two texts; of a pair that is too long the longer text is cut."""
        ids, cut = encode_pairs(self.tokenizer, rows, self.max_length)
        warn_of_cut(cut, self.max_length)
        out = np.zeros((len(ids), self.task.outputs), np.float32)
        forward = functools.partial(self._forward, self.params)
        for numbers, logits in run_by_length(forward, [(ids, self.tokenizer.pad_id)], self.max_length):
            out[numbers] = logits
        return out

    def predict(self, texts: Sequence[str | tuple[str, ...]]) -> list[dict[str, Any]]:
        """For each row `label` with its `probability` and the `probabilities` of all classes; for a regression
        `value`; for several labels `labels` and `probabilities`; for a choice its number from 0 as `choice`."""
        if isinstance(texts, str):
            raise UserError("predict: expected a list of texts, not one text")
        rows = [tuple(row) if isinstance(row, (tuple, list)) else (row,) for row in texts]
        check_texts("predict", "row", rows)
        if self.task.kind == "choice":
            return self._choose(rows)
        for row in rows:
            if not (1 <= len(row) <= 2 if self.texts is None else len(row) == self.texts):
                expected = {None: "a text or a pair of texts", 1: "one text", 2: "a pair of texts"}[self.texts]
                raise UserError(f"predict: expected {expected}, not {len(row)} text{'s' * (len(row) != 1)}")
        return [self._describe(row) for row in self.logits(rows).astype(np.float64)]

    def _describe(self, logits: Float[np.ndarray, " C"]) -> dict[str, Any]:
        if self.task.kind == "number":
            return {"value": float(logits[0]) * self.task.scale}
        if self.task.kind == "labels":
            shares = 1 / (1 + np.exp(-logits))
            found = [name for name, share in zip(self.task.classes, shares, strict=True) if share > 0.5]
            return {"labels": found, "probabilities": dict(zip(self.task.classes, shares.tolist(), strict=True))}
        shares = _softmax(logits)
        best = int(np.argmax(shares))
        return {
            "label": self.task.classes[best],
            "probability": float(shares[best]),
            "probabilities": dict(zip(self.task.classes, shares.tolist(), strict=True)),
        }

    def _choose(self, rows: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
        for row in rows:
            if len(row) < 3:
                raise UserError(f"predict: expected a context and at least two choices, not {len(row)} texts")
        logits = self.logits([(row[0], choice) for row in rows for choice in row[1:]])[:, 0].astype(np.float64)
        ends = np.cumsum([len(row) - 1 for row in rows])
        found = []
        for shares in map(_softmax, np.split(logits, ends[:-1]) if rows else []):
            best = int(np.argmax(shares))
            found.append({"choice": best, "probability": float(shares[best]), "probabilities": shares.tolist()})
        return found


def _softmax(logits: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
