"""Answers to questions as spans of a context."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from electrax.data.examples import QuestionExample
from electrax.data.windows import Windows, max_context
from electrax.models.masks import segment_ids
from electrax.models.spans import JointSpanHead, PlainSpanHead, SpanLogits, SpanStyle
from electrax.tasks import answers
from electrax.tasks.base import Batch, Mean, Metrics, Params
from electrax.tasks.finetune import FinetuneTask

NULL_WEIGHT = 0.5  # of the classifier in the loss


@dataclasses.dataclass(frozen=True)
class AnswerTask(FinetuneTask):
    """A span head on windows of `electrax.data.windows`; `windows` are those of the rows of `dev`.

    The null score of a question says that it has no answer. For the joint head it is the least of its windows' logits,
    for the plain head the least score of the span [CLS] minus that of the best answer. Only with `no_answer` does it
    matter, and then a score above `null_threshold` makes the answer empty.
    """

    style: SpanStyle = "joint"
    beam: int = 20  # starts, and ends for each of them
    max_answer: int = 30  # tokens
    n_best: int = 20
    no_answer: bool = False
    null_threshold: float = -2.75  # the reference's
    metric: str = "f1"
    windows: Windows | None = dataclasses.field(default=None, repr=False, compare=False)

    def head(self) -> JointSpanHead | PlainSpanHead:
        return JointSpanHead(self.encoder) if self.style == "joint" else PlainSpanHead(self.encoder)

    # -- on the device ------------------------------------------------------------------------------------------------

    def _mask(self, ids: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """[CLS], the context and the [SEP] after it, as in the reference."""
        return (segment_ids(ids, self.sep_id, self.pad_id) == 1).at[:, 0].set(True)

    def _losses(self, logits: SpanLogits, prepared: Batch) -> tuple[Float[Array, " B"], Metrics]:
        weight = prepared["weight"]
        start = optax.softmax_cross_entropy_with_integer_labels(logits.start, prepared["start"])
        end = optax.softmax_cross_entropy_with_integer_labels(logits.end, prepared["end"])
        losses = (start + end) / 2
        found = {"span_loss": Mean.of(losses, weight)}
        if self.style == "joint":
            null = optax.sigmoid_binary_cross_entropy(logits.null, prepared["impossible"])
            found["null_loss"] = Mean.of(null, weight)
            losses = losses + NULL_WEIGHT * null
        return losses, found

    def loss(self, params: Params, prepared: Batch) -> tuple[Float[Array, ""], Metrics]:
        ids = prepared["ids"].astype(jnp.int32)
        hidden = self.hidden(params, ids, prepared["dropout_seed"][:, 0])
        logits = self.head().apply({"params": params["head"]}, hidden, self._mask(ids), prepared["start"])
        losses, found = self._losses(logits, prepared)
        return jnp.sum(losses * prepared["share"]), found

    def beams(
        self, params: Params, ids: Int[Array, "B L"], hidden: Float[Array, "B L D"] | None = None
    ) -> dict[str, jax.Array]:
        """What `predictions` chooses from: `start` [B, K], `end` and `score` [B, K, K], `null` [B]."""
        hidden = self.hidden(params, ids) if hidden is None else hidden
        head = self.head()
        return head.apply({"params": params["head"]}, hidden, self._mask(ids), self.beam, method=head.beams)._asdict()

    def evaluate(self, params: Params, prepared: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        """The loss is that of training, given the true start; it does not count in a file without answers."""
        ids = prepared["ids"].astype(jnp.int32)
        hidden = self.hidden(params, ids)
        logits = self.head().apply({"params": params["head"]}, hidden, self._mask(ids), prepared["start"])
        losses, _ = self._losses(logits, prepared)
        return {"loss": Mean.of(losses, prepared["weight"])}, self.beams(params, ids, hidden)

    # -- from windows to answers --------------------------------------------------------------------------------------

    def predictions(self, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """For each question its `id`, the best answer's `text`, `start`, `end` (characters) and `score`, `null_score`,
        and `n_best`: different texts, best first, each with its `probability` among them.

        The text is never withheld for its null score; it is empty only if no span can be an answer. `arrays` are those
        of `beams` for all rows of `windows`.
        """
        return [self._prediction(number, part, arrays) for number, part in enumerate(self.windows.parts())]

    def _prediction(self, number: int, part: slice, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        example, spans = self.windows.examples[number], self.windows.spans[number]
        first, last, score = self._candidates(part, arrays)
        found: dict[str, dict[str, Any]] = {}
        for i in np.argsort(-score, kind="stable"):
            start, end = _trim(example.context, int(spans[first[i], 0]), int(spans[last[i], 1]))
            text = example.context[start:end]
            if text and text not in found:
                found[text] = {"text": text, "start": start, "end": end, "score": float(score[i])}
                if len(found) == self.n_best:
                    break
        n_best = _with_probabilities(list(found.values()))
        best = n_best[0] if n_best else {"text": "", "start": 0, "end": 0, "score": 0.0}
        null = float(arrays["null"][part].min()) - (best["score"] if self.style == "plain" else 0.0)
        answer = {key: best[key] for key in ("text", "start", "end", "score")}
        return {"id": example.id, **answer, "null_score": null, "n_best": n_best}

    def _candidates(
        self, part: slice, arrays: dict[str, np.ndarray]
    ) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"], Float[np.ndarray, " C"]]:
        """First and last token (of the context) and score of the spans in a question's beams that can be its answer:
        not too long, within the context, each from the window that shows most around its start."""
        fields, sizes = self.windows.rows.fields, self.windows.sizes(part)
        offset, document = fields["offset"][part][:, None], fields["document"][part][:, None]
        first, last = arrays["start"][part] - offset, arrays["end"][part] - offset[..., None]  # in the window's context
        inside = (first >= 0) & (first < sizes[:, None])
        shown_by = np.append(max_context(document[:, 0], sizes), -1)  # the last: of what is not in the context
        begins = shown_by[np.where(inside, first + document, -1)] == np.arange(len(sizes))[:, None]
        length = last - first[..., None] + 1
        fits = begins[..., None] & (length >= 1) & (length <= self.max_answer) & (last < sizes[:, None, None])
        window, i, j = np.nonzero(fits)
        move = document[window, 0]
        return first[window, i] + move, last[window, i, j] + move, arrays["score"][part][fits]

    # -- figures ------------------------------------------------------------------------------------------------------

    def summarize(self, means: dict[str, float], arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """As the official scripts. With `no_answer` also what the best threshold would give, as `best_f1` and
        `best_f1_thresh`, `best_exact` and `best_exact_thresh`."""
        found = self.predictions(arrays)
        texts = {str(number): prediction["text"] for number, prediction in enumerate(found)}
        golds = {str(number): _golds(example) for number, example in enumerate(self.windows.examples)}
        if not self.no_answer:
            return means | answers.question_figures(texts, golds)
        null = {str(number): prediction["null_score"] for number, prediction in enumerate(found)}
        given = answers.apply_threshold(texts, null, self.null_threshold)
        return means | answers.question_figures(given, golds) | answers.threshold_figures(texts, golds, null)

    @property
    def metrics(self) -> tuple[str, ...]:
        return "f1", "exact", *(("best_f1", "best_exact") if self.no_answer else ()), "loss"

    def diagnose(self, figures: dict[str, float], arrays: dict[str, np.ndarray]) -> list[str]:
        """What did not train, in words; empty where it did."""
        said = []
        if len(arrays["start"]) > 1 and np.ptp(arrays["start"][:, 0]) == 0:
            said.append(f"it is stuck at one place: every window's answer starts at token {int(arrays['start'][0, 0])}")
        if self.no_answer and len(arrays["null"]) > 1 and np.ptp(arrays["null"]) < 1e-3:
            said.append("it gives every window the same score of having no answer")
        if self.no_answer and any(map(_golds, self.windows.examples)):
            scores = [found["null_score"] for found in self.predictions(arrays)]
            if min(scores) > self.null_threshold:
                said.append("it is stuck at no answer: every question gets none")
        return said


def _golds(example: QuestionExample) -> list[str]:
    return [] if example.impossible else list(example.golds) or [answer.text for answer in example.answers]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Without the space around it, which some tokens cover."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _with_probabilities(n_best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scores = np.array([entry["score"] for entry in n_best], np.float64)
    weights = np.exp(scores - scores.max()) if len(scores) else scores
    return [entry | {"probability": float(share)} for entry, share in zip(n_best, weights / weights.sum(), strict=True)]
