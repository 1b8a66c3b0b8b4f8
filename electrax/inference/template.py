"""A discriminator as a classifier: the class whose word looks most original in a template."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from electrax.data.templates import check_template, fill_templates
from electrax.data.tokenizer import Tokenizer
from electrax.inference.batching import run_by_length, warn_of_cut
from electrax.inference.classifier import Classifier
from electrax.tasks.base import Params
from electrax.tasks.template import TemplateTask


class TemplateClassifier(Classifier):
    """`words` are those of the task's classes, in their order. Pretrained parameters make it a zero-shot classifier,
    those of a TemplateTask a few-shot one.

    The discriminator judges each word by itself. The probability of a class, softmax of the logits, is that of its word
    alone being original, given that exactly one is.
    """

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer,
        task: TemplateTask,
        max_length: int,
        words: Sequence[str],
        template: str,
        texts: int | None = None,
    ):
        check_template(template, words)
        super().__init__(params, tokenizer, task, max_length, texts)
        self.words, self.template = tuple(words), template
        # what is compiled does not depend on the classes
        self._forward = functools.partial(_originality, dataclasses.replace(task, classes=()))
        self._inputs = 2

    def logits(self, rows: Sequence[tuple[str, ...]]) -> Float[np.ndarray, "N C"]:
        """How original each class's word looks with rows of one or two texts; long texts are cut, the template not."""
        ids, spans, cut = fill_templates(self.tokenizer, rows, self.words, self.template, self.max_length)
        warn_of_cut(cut, self.max_length)
        out = np.zeros(len(ids), np.float32)
        columns = ((ids, self.tokenizer.pad_id), (spans, 0))
        for numbers, found in run_by_length(functools.partial(self._forward, self.params), columns, self.max_length):
            out[numbers] = found
        return out.reshape(len(rows), len(self.words))


@functools.partial(jax.jit, static_argnums=0)
def _originality(task: TemplateTask, params: Params, ids: Array, spans: Array) -> Float[Array, " B"]:
    return task.logits(params, {"ids": ids[:, None], "spans": spans[:, None]})[:, 0]
