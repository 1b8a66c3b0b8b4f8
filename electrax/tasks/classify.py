"""Classes, several labels at once, a number, or one of several choices, from one text or a pair."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from electrax.models.heads import HeadStyle, OutputHead
from electrax.tasks import metrics as scorers
from electrax.tasks.base import Batch, Mean, Metrics, Params
from electrax.tasks.finetune import FinetuneTask

Kind = Literal["classes", "labels", "number", "choice"]


@dataclasses.dataclass(frozen=True)
class ClassifyTask(FinetuneTask):
    """A head on [CLS]. The field `label` of a row is int32 (`classes`, `choice`), float32 [C] (`labels`) or float32
    divided by `scale` (`number`). Rows of `choice` have ids [B, n, L], one text for each choice.

    With a teacher the rows have its `teacher` logits, and `teacher_weight` of the loss is the cross entropy with its
    softened probabilities times T² (Hinton et al., 2015, section 2), or the squared distance from its number.
    """

    first = 1
    kind: Kind = "classes"
    classes: tuple[str, ...] = ()
    scale: float = 1.0
    style: HeadStyle = "linear"
    teacher_weight: float = 0.0
    teacher_temperature: float = 1.0

    @property
    def outputs(self) -> int:
        return 1 if self.kind in ("number", "choice") else len(self.classes)

    def head(self) -> OutputHead:
        return OutputHead(self.encoder, self.outputs, self.style)

    def logits(self, params: Params, prepared: Batch, train: bool = False) -> Float[Array, "B C"]:
        ids = prepared["ids"].astype(jnp.int32)
        choices = ids.shape[1] if self.kind == "choice" else 1
        body, top = (jnp.repeat(s, choices) for s in prepared["dropout_seed"].T) if train else (None, None)
        first = self.hidden(params, ids.reshape(-1, ids.shape[-1]), body)[:, 0]
        logits = self.head().apply({"params": params["head"]}, first, top)
        return logits.reshape(ids.shape[0], choices) if self.kind == "choice" else logits

    def _losses(self, logits: Float[Array, "B C"], prepared: Batch) -> Float[Array, "B"]:
        label = prepared["label"]
        match self.kind:
            case "number":
                return jnp.square(logits[:, 0] - label)
            case "labels":
                return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, label), axis=-1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def _teacher_losses(self, logits: Float[Array, "B C"], prepared: Batch) -> Float[Array, "B"]:
        t, teacher = self.teacher_temperature, prepared["teacher"]
        match self.kind:
            case "number":
                return jnp.square(logits - teacher)[:, 0]
            case "labels":
                return t * t * jnp.mean(optax.sigmoid_binary_cross_entropy(logits / t, jax.nn.sigmoid(teacher / t)), -1)
        return t * t * optax.softmax_cross_entropy(logits / t, jax.nn.softmax(teacher / t))

    def loss(self, params: Params, prepared: Batch) -> tuple[Float[Array, ""], Metrics]:
        logits = self.logits(params, prepared, train=True)
        losses, weight = self._losses(logits, prepared), prepared["weight"]
        found = {"label_loss": Mean.of(losses, weight)}
        if self.teacher_weight:
            distance = self._teacher_losses(logits, prepared)
            found["teacher_loss"] = Mean.of(distance, weight)
            losses = (1 - self.teacher_weight) * losses + self.teacher_weight * distance
        if self.kind in ("classes", "choice"):
            found["accuracy"] = Mean.of(jnp.argmax(logits, -1) == prepared["label"], weight)
        return jnp.sum(losses * prepared["share"]), found

    def evaluate(self, params: Params, prepared: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        logits = self.logits(params, prepared)
        losses = self._losses(logits, prepared)
        return {"loss": Mean.of(losses, prepared["weight"])}, {"logits": logits, "label": prepared["label"]}

    def summarize(self, means: dict[str, float], arrays: dict[str, np.ndarray]) -> dict[str, float]:
        logits, label = arrays["logits"], arrays["label"]
        match self.kind:
            case "number":
                return means | scorers.regression_figures(logits[:, 0] * self.scale, label * self.scale)
            case "labels":
                return means | scorers.multilabel_figures(logits > 0, label > 0.5)
        return means | scorers.classification_figures(np.argmax(logits, -1), label, logits.shape[1])

    @property
    def metrics(self) -> tuple[str, ...]:
        match self.kind:
            case "number":
                return "pearson", "spearman", "mse", "loss"
            case "labels":
                return "micro_f1", "macro_f1", "samples_f1", "exact_match", "loss"
        two = ("f1",) if len(self.classes) == 2 else ()
        return "accuracy", "macro_f1", "matthews", *two, "loss"

    def tables(self, arrays: dict[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
        """Precision, recall, F1 and support of each class or label, and how often each class or choice was taken for
        each."""
        logits, label = arrays["logits"], arrays["label"]
        match self.kind:
            case "number":
                return {}
            case "labels":
                figures = scorers.per_label(logits > 0, label > 0.5)
                return {"by_label": scorers.figures_of_each("label", self.classes, figures)}
        counts = scorers.confusion(np.argmax(logits, -1), label, logits.shape[1])
        if self.kind == "choice":
            numbers = [str(number) for number in range(len(counts))]
            return {"confusion": scorers.confusion_table("choice", numbers, counts)}
        by_class = scorers.figures_of_each("class", self.classes, scorers.per_class(counts))
        return {"by_class": by_class, "confusion": scorers.confusion_table("class", self.classes, counts)}

    def diagnose(self, figures: dict[str, float], arrays: dict[str, np.ndarray]) -> list[str]:
        """What did not train, in words; empty where it did."""
        if self.kind == "number":
            several = len(arrays["logits"]) > 1
            if several and np.ptp(arrays["logits"]) < 1e-3:
                return ["it gives every row the same number"]
            correlates = self.metric in ("pearson", "spearman")
            if several and correlates and not np.ptp(arrays["label"]):
                return [f"its {self.metric} is not a number: every dev row has the same label"]
            return []
        if self.kind == "labels":
            return [] if (arrays["logits"] > 0).any() else ["it gives no row any label"]
        said = np.unique(np.argmax(arrays["logits"], -1))
        if len(said) == 1 and len(np.unique(arrays["label"])) > 1:
            answer = self.classes[int(said[0])] if self.kind == "classes" else f"choice {int(said[0])}"
            return [f"it is stuck at one class: every row gets {answer!r}"]
        return []
