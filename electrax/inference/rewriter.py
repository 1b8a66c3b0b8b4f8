"""A fine-tuned model that writes one text from another: a translator, a summariser."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from electrax.config import UserError
from electrax.data.encoded import encode_pairs
from electrax.data.examples import check_texts
from electrax.data.tokenizer import Tokenizer
from electrax.inference.batching import compiled, run_by_length, warm_up, warn_of_cut
from electrax.tasks.base import Params
from electrax.tasks.rewrite import RewriteTask


class Candidate(NamedTuple):
    """What a text may become, the better the higher its score: of beam search, or a re-ranker's."""

    text: str
    score: float


@runtime_checkable
class Reranker(Protocol):
    """A pretrained model of the target's language."""

    def originality(self, texts: Sequence[str], truncate: bool = False) -> Float[np.ndarray, "N"]: ...


class Rewriter:
    """Sources of more than `max_length` tokens are cut, with a warning that counts them."""

    def __init__(self, params: Params, tokenizer: Tokenizer, target: Tokenizer, task: RewriteTask, max_length: int):
        self.params, self.tokenizer, self.target, self.task, self.max_length = (
            params, tokenizer, target, task, max_length
        )  # fmt: skip
        self._rewrite = functools.lru_cache(maxsize=8)(self._compiled)

    def _compiled(self, beams: int, n_best: int):
        return compiled(functools.partial(self.task.rewrite, beams=beams, n_best=n_best))

    def warm_up(self, longest: int | None = None, n_best: int = 1, beams: int = 0) -> int:
        """Compiles what `rewrite` (n_best 1) or `candidates` needs for texts of up to `longest` tokens (None: of any
        length), so that no later call does; returns how many programs these are."""
        forward = functools.partial(self._rewrite(beams or max(self.task.beams, n_best), n_best), self.params)
        return warm_up(forward, 1, self.max_length, longest)

    def rewrite(self, texts: Sequence[str], beams: int = 0, reranker: Reranker | None = None) -> list[str]:
        """The best output of each text. `beams` 0: as in the config; 1: always the likeliest token. A `reranker`
        chooses among all beams."""
        beams = beams or self.task.beams
        found = self.candidates(texts, n_best=beams if reranker else 1, beams=beams, reranker=reranker)
        return [each[0].text for each in found]

    def candidates(
        self, texts: Sequence[str], n_best: int = 4, beams: int = 0, reranker: Reranker | None = None
    ) -> list[list[Candidate]]:
        """The `n_best` best outputs of each text, the best first; fewer where there are no more. A `reranker` puts them
        in the order of their originality."""
        beams = beams or max(self.task.beams, n_best)
        if isinstance(texts, str):
            raise UserError("rewrite: expected a list of texts, not one text")
        if not 1 <= n_best <= beams:
            raise UserError(f"rewrite: expected n_best from 1 to the {beams} beams, not {n_best}")
        if beams > self.target.vocab_size:
            raise UserError(f"rewrite: {beams} beams are more than the {self.target.vocab_size} tokens there are")
        check_texts("rewrite", "row", ((text,) for text in texts))
        rows, cut = encode_pairs(self.tokenizer, [(text,) for text in texts], self.max_length)
        warn_of_cut(cut, self.max_length)
        forward = functools.partial(self._rewrite(beams, n_best), self.params)
        found: list[list[Candidate]] = [[] for _ in texts]
        for numbers, decoded in run_by_length(forward, [(rows, self.tokenizer.pad_id)], self.max_length):
            for number, ids, scores in zip(numbers, decoded.ids, decoded.scores, strict=True):
                there = scores > np.finfo(np.float32).min  # a short limit may not allow so many
                found[number] = [
                    Candidate(self.target.decode(row), float(score))
                    for row, score in zip(ids[there], scores[there], strict=True)
                ]
        return [_reranked(each, reranker) for each in found] if reranker else found


def _reranked(candidates: list[Candidate], reranker: Reranker) -> list[Candidate]:
    """By originality; an empty text has none and comes last."""
    texts = [candidate.text for candidate in candidates if candidate.text.strip()]
    scores = dict(zip(texts, reranker.originality(texts, truncate=True).tolist(), strict=True)) if texts else {}
    scored = [Candidate(candidate.text, scores.get(candidate.text, -np.inf)) for candidate in candidates]
    return sorted(scored, key=lambda candidate: -candidate.score)
