"""A pretrained model as an object: encode, detect, fill, classify."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from electrax.config import UserError
from electrax.data.examples import check_texts
from electrax.data.tokenizer import Tokenizer
from electrax.inference import forward
from electrax.inference.batching import compiled, pad, padded_length, run_by_length, warm_up
from electrax.inference.generation import CausalModel, Continuation
from electrax.inference.packing import SHORTEST_ROW, run_packed
from electrax.inference.template import TemplateClassifier
from electrax.models.encoder import EncoderConfig
from electrax.models.generator import GeneratorKind
from electrax.tasks.base import Params
from electrax.tasks.template import TemplateTask

POOLINGS = ("mean", "cls")
Method = Literal["encode", "detect", "originality", "fill"]  # that can be compiled before it is called
CAUSAL_KINDS = ("causal", "hybrid")  # of generators that continue texts


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
        shape = self._main, tower, self.reads_one_way
        self._encode = compiled(functools.partial(forward.encode, *shape))
        self._pool = {name: compiled(functools.partial(forward.pool, *shape, name)) for name in POOLINGS}
        self._detect = compiled(functools.partial(forward.detect, discriminator))
        self._fill = compiled(functools.partial(forward.fill, generator, generator_kind))
        self._sample = jax.jit(
            functools.partial(forward.sample, generator, generator_kind, tokenizer.special_ids),
            static_argnames="temperature",
        )
        self._likelihood = compiled(functools.partial(forward.likelihood, generator, generator_kind))

    @property
    def reads_one_way(self) -> bool:
        """Whether the main tower is a causal LM, whose state at a token says nothing of what stands behind."""
        return self.discriminator is None and self.generator_kind == "causal"

    def encode(
        self, texts: Sequence[str], pooling: str | None = None, truncate: bool = False, packed: bool = False
    ) -> Float[np.ndarray, "B *L D"]:
        """Last hidden states of the main tower [B, L, D], float32, for `[CLS] text [SEP]`; zeros beyond a text's end.

        With the `pooling` mean or cls one vector a text [B, D], which does not depend on the other texts: the mean over
        all of its tokens, [CLS] and [SEP] too, or that of [CLS]. A text of more than `max_length` tokens is a
        UserError, or cut with `truncate`. `packed` computes several short texts in one row, with the same result: fewer
        programs are compiled, two or three for each length of row, but on a CPU rows of the texts' own lengths are
        faster.
        """
        rows = self._rows("encode", texts, truncate)
        self._check_pooling(pooling)
        if pooling is None and not rows:
            raise UserError("encode: expected at least one text")
        longest = () if pooling else (max(map(len, rows)),)
        out = np.zeros((len(rows), *longest, self._main.width), np.float32)
        if packed and rows:
            forward = self._forward(pooling)
            for number, which, start, found in run_packed(forward, rows, self.tokenizer.pad_id, self.max_length):
                if pooling:
                    out[number] = found[which]
                else:
                    length = len(rows[number])
                    out[number, :length] = found[start : start + length]
        else:
            for numbers, found in self._run(pooling, rows):
                if pooling:
                    out[numbers] = found
                else:
                    length = min(out.shape[1], found.shape[1])
                    out[numbers, :length] = found[:, :length]
        return out

    def warm_up(
        self, pooling: str | None = None, longest: int | None = None, packed: bool = False, method: Method = "encode"
    ) -> int:
        """Compiles what a method needs, `encode` with this pooling and `packed` or not, for texts of up to `longest`
        tokens (None: of any length), so that no later call does; returns how many programs these are. Seconds for each,
        less where they are in JAX's compilation cache. For texts that are written there is `causal().warm_up`."""
        if method == "encode":
            self._check_pooling(pooling)
            columns, shortest = (3, SHORTEST_ROW) if packed else (1, 0)
            return warm_up(self._forward(pooling), columns, self.max_length, longest, shortest)
        if pooling is not None or packed:
            raise UserError(f"warm_up: pooling and packed are for encode, not for {method}")
        programs = {
            "detect": (self._check_detects, self._detect, 1),
            "originality": (self._check_detects, self._detect, None),
            "fill": (self._check_fills, self._fill, 1),
        }
        if method not in programs:
            raise UserError(f"warm_up: expected the method encode, {', '.join(programs)}, not {method!r}")
        check, program, rows = programs[method]
        check(method)
        forward = functools.partial(program, self.params)
        return warm_up(lambda ids: forward(ids, self.tokenizer.pad_id), 1, self.max_length, longest, most_rows=rows)

    def detect(self, text: str) -> list[Token]:
        """Each token of the text with the probability that it was replaced."""
        self._check_detects("detect")
        ids, offsets = self.tokenizer.encode(text)
        row = self._row(ids)
        scores = np.asarray(self._detect(self.params, self._padded(row), self.tokenizer.pad_id))[0]
        probabilities = 1 / (1 + np.exp(-scores[1 : len(ids) + 1].astype(np.float64)))
        pieces = self.tokenizer.pieces(ids)
        return [Token(p, *span, float(q)) for p, span, q in zip(pieces, offsets, probabilities, strict=True)]

    def originality(self, texts: Sequence[str], truncate: bool = False) -> Float[np.ndarray, "N"]:
        """The mean over a text's tokens of the log-probability that the token is the original one: the higher, the
        less the discriminator would change."""
        self._check_detects("originality")
        rows = self._rows("originality", texts, truncate)
        _check_not_empty("originality", rows)
        out = np.zeros(len(rows), np.float64)
        forward = functools.partial(self._detect, self.params)
        for numbers, scores in run_by_length(
            lambda ids: forward(ids, self.tokenizer.pad_id), [(rows, self.tokenizer.pad_id)], self.max_length
        ):
            for number, row in zip(numbers, scores.astype(np.float64), strict=True):
                out[number] = -np.mean(np.logaddexp(0.0, row[1 : len(rows[number]) - 1]))
        return out

    def pseudo_log_likelihood(self, texts: Sequence[str], truncate: bool = False) -> Float[np.ndarray, "N"]:
        """The sum over a text's tokens of the generator's log-probability of the token in its place, masked out alone
        (Salazar et al., 2020, "Masked Language Model Scoring"). A text of n tokens costs n rows."""
        self._check_fills("pseudo_log_likelihood")
        rows = self._rows("pseudo_log_likelihood", texts, truncate)
        _check_not_empty("pseudo_log_likelihood", rows)
        masked, places = [], []  # a row and its only masked-out place, for each token
        for number, row in enumerate(rows):
            for place in range(1, len(row) - 1):
                masked.append([*row[:place], self.tokenizer.mask_id, *row[place + 1 :]])
                places.append((number, place))
        # what stands at the place is read from a second column of the same length
        true = [[-1] * len(row) for row in masked]
        for row, (number, place) in zip(true, places, strict=True):
            row[place] = rows[number][place]
        out = np.zeros(len(rows), np.float64)
        columns = [(masked, self.tokenizer.pad_id), (true, -1)]
        forward = functools.partial(self._likelihood, self.params)
        for numbers, found in run_by_length(
            lambda ids, true: forward(ids, true, self.tokenizer.pad_id), columns, self.max_length
        ):
            for place, log_probability in zip(numbers, found.tolist(), strict=True):
                out[places[place][0]] += log_probability
        return out

    def replace(
        self, texts: Sequence[str], share: float = 0.15, temperature: float = 1.0, seed: int | Sequence[int] = 0
    ) -> list[str]:
        """The texts with that share of their tokens, at least one, masked out and sampled anew from the generator, all
        of a text at once. Special tokens are not sampled. Text n of a seed depends on no other; what does not fit into
        the model is cut."""
        self._check_fills("replace")
        rows = self._rows("replace", texts, truncate=True)
        masked, uniform = [list(row) for row in rows], []
        for number, row in enumerate(masked):
            random = np.random.default_rng([*np.atleast_1d(seed).tolist(), number])
            inside = len(row) - 2
            for place in 1 + random.permutation(inside)[: max(1, round(share * inside)) if inside else 0]:
                row[place] = self.tokenizer.mask_id
            uniform.append((random.random(len(row)) * 2**30).astype(np.int32).tolist())  # where a sample falls
        columns = [(masked, self.tokenizer.pad_id), (uniform, 0)]
        program = functools.partial(self._sample, self.params, temperature=temperature)
        for numbers, found in run_by_length(program, columns, self.max_length):
            for number, drawn in zip(numbers, found.tolist(), strict=True):
                rows[number] = [
                    drawn[place] if token == self.tokenizer.mask_id else token
                    for place, token in enumerate(masked[number])
                ]
        return [self.tokenizer.decode(row) for row in rows]

    def causal(self, what: str = "causal") -> CausalModel:
        """Its generator as a model that continues texts; a UserError that names `what` was wanted where it is none."""
        if self.generator is None or self.generator_kind not in CAUSAL_KINDS:
            raise UserError(f"{what}: this model has no decoder; expected a generator.kind {' or '.join(CAUSAL_KINDS)}")
        return CausalModel(self.params, self.tokenizer, self.generator, self.max_length)

    def generate(self, prompts: Sequence[str], **options: Any) -> list[list[Continuation]]:
        """Continuations of each prompt; options as in CausalModel.generate."""
        return self.causal("generate").generate(prompts, **options)

    def perplexity(self, text: str, stride: int = 0) -> float:
        """Of a text with its end, a token; `stride` as in CausalModel.likelihood."""
        return self.causal("perplexity").likelihood(text, stride).perplexity

    def rank(self, texts: Sequence[str], by: str = "originality") -> list[tuple[str, float]]:
        """The texts with their scores, the best first, `by` originality, pseudo_log_likelihood or perplexity."""
        match by:
            case "originality" | "pseudo_log_likelihood":
                scores = getattr(self, by)(texts).tolist()
            case "perplexity":
                scores = [self.perplexity(text) for text in texts]
            case _:
                raise UserError(f"rank: by originality, pseudo_log_likelihood or perplexity, not {by!r}")
        order = sorted(range(len(texts)), key=lambda n: scores[n] if by == "perplexity" else -scores[n])
        return [(texts[n], scores[n]) for n in order]

    def fill(self, text: str, candidates: int = 5) -> list[list[Candidate]]:
        """For each mask token in the text (its name in the vocabulary, as "[MASK]"), the likeliest tokens."""
        self._check_fills("fill")
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

    def _check_fills(self, what: str) -> None:
        if self.generator_kind in ("two_tower", "causal"):
            name = self.generator_kind.replace("_", "-")
            raise UserError(f"{what}: a {name} generator predicts no masked-out tokens")
        if self.generator is None:
            raise UserError(f"{what}: this model has no generator")

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
        texts = list(texts)
        check_texts(what, "row", ((text,) for text in texts))
        return [self._row(ids, truncate) for ids in self.tokenizer.encode_batch(texts)]

    def _run(self, pooling: str | None, rows: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return run_by_length(self._forward(pooling), [(rows, self.tokenizer.pad_id)], self.max_length)

    def _forward(self, pooling: str | None) -> Callable[..., jax.Array]:
        program = self._encode if pooling is None else self._pool[pooling]
        return lambda ids, *packed: program(self.params, ids, self.tokenizer.pad_id, *packed)

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


def _check_not_empty(what: str, rows: Sequence[Sequence[int]]) -> None:
    empty = next((number for number, row in enumerate(rows) if len(row) < 3), None)
    if empty is not None:
        raise UserError(f"{what}: text {empty} is empty")
