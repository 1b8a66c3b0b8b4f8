"""A fine-tuned model, loaded from its work directory."""

import os

from electrax.config import UserError
from electrax.data.glue import GLUE
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import FinetuneConfig, computed_in, finished, read_config
from electrax.experiment.foreign import as_workdir
from electrax.experiment.head import read_head
from electrax.experiment.objective import make_task
from electrax.experiment.rewrite import kept_target
from electrax.experiment.rows import template_words
from electrax.experiment.run import trained
from electrax.inference.classifier import Classifier
from electrax.inference.reader import Reader
from electrax.inference.rewriter import Rewriter
from electrax.inference.tagger import Tagger
from electrax.inference.template import TemplateClassifier
from electrax.models.products import rounded_layers


def load(workdir: str | os.PathLike, compute_dtype: str | None = None) -> Classifier | Tagger | Reader | Rewriter:
    """A fine-tuned model with its tokenizer."""
    workdir = finished(workdir)
    config = computed_in(read_config(workdir), compute_dtype)
    tokenizer, head = Tokenizer.load(workdir), read_head(workdir)
    task = make_task(config, tokenizer, head, None)
    params, data = rounded_layers(trained(workdir)[1], config.model.compute_dtype), config.data
    # of a choice there may be more than in training, and a model of another format had no rows here
    texts = len(_text_columns(config)) if data.path and config.head.kind != "choice" else None
    match config.task:
        case "classify" if config.head.template:
            words = template_words(config.head, head["classes"])
            return TemplateClassifier(params, tokenizer, task, data.max_length, words, config.head.template, texts)
        case "classify":
            return Classifier(params, tokenizer, task, data.max_length, texts)
        case "tag":
            return Tagger(params, tokenizer, task, data.max_length)
        case "answer":
            return Reader(params, tokenizer, task, data.max_length, data.doc_stride, data.max_query)
        case "rewrite":
            return Rewriter(params, tokenizer, kept_target(workdir, config, tokenizer), task, data.max_length)


def text_columns(workdir: str | os.PathLike) -> tuple[str, ...]:
    """The columns of a table that the model predicts from: those of its training rows."""
    config = read_config(as_workdir(workdir))
    if not isinstance(config, FinetuneConfig):
        raise UserError(f"{workdir}: expected the work directory of a fine-tuning; this is one of a pretraining")
    return _text_columns(config)


def _text_columns(config: FinetuneConfig) -> tuple[str, ...]:
    if config.task == "answer" and config.data.format != "table":
        return "question", "context"
    return GLUE[config.data.glue].texts if config.data.format == "glue" else config.data.text
