"""A fine-tuning run: its config, the weights it starts from, its rows, its objective."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from electrax.config import UserError
from electrax.data.examples import BadRows, Example
from electrax.data.glue import GLUE
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import (
    NULL_THRESHOLDS,
    FinetuneConfig,
    PretrainConfig,
    computed_in,
    finished,
    read_config,
)
from electrax.experiment.examples import read_examples, sha256_of, targets_of, texts_of
from electrax.experiment.foreign import as_workdir
from electrax.experiment.head import keep_head, read_head, takes_head
from electrax.experiment.plan import Plan, plan_mesh, plan_run
from electrax.experiment.rewrite import (
    decoder_fields,
    keep_target,
    kept_target,
    rewrite_rows,
    started_decoder,
    target_tokenizer,
)
from electrax.experiment.rows import TaskRows, answer_rows, classify_rows, tag_rows, template_words
from electrax.experiment.run import (
    HEAD_FILE,
    Run,
    assemble,
    holds_run,
    keep_config,
    kept_tokenizer,
    load_params,
    mesh_for,
    trained,
)
from electrax.experiment.start import same_shapes, shared_tokens, start_of, taken_embeddings
from electrax.inference.classifier import Classifier
from electrax.inference.reader import Reader
from electrax.inference.rewriter import Rewriter
from electrax.inference.tagger import Tagger
from electrax.inference.template import TemplateClassifier
from electrax.models.products import rounded_layers
from electrax.models.sizes import discriminator_shape
from electrax.tasks.answer import AnswerTask
from electrax.tasks.base import Params
from electrax.tasks.classify import ClassifyTask
from electrax.tasks.finetune import FinetuneTask
from electrax.tasks.rewrite import RewriteTask
from electrax.tasks.tag import TagTask
from electrax.tasks.template import TemplateTask
from electrax.training.evaluate import make_evaluate
from electrax.training.processes import agreed, together
from electrax.training.tracking import Record

# the paper's (tables 7 and 8): learning rate, layer-wise decay
PAPER = {
    "tiny": (3e-4, 0.8),
    "small": (3e-4, 0.8),
    "small++": (3e-4, 0.8),
    "base": (1e-4, 0.8),
    "large": (5e-5, 0.9),
}
REWRITE = (5e-4, 1.0)  # a decoder has more to learn than a head
# keys of [model] that belong to the pretrained weights; the others are free in fine-tuning
SHAPE = ("size", "body", "layers", "width", "heads", "feed_forward", "embedding_width", "max_length", "qk_norm")
# data.format of the rows that a task learns from
FORMATS = {
    "classify": ("table", "glue"),
    "tag": ("conll", "conllu", "table"),
    "answer": ("squad", "mrqa", "table"),
    "rewrite": ("table", "parallel"),
}


# -- what it starts from -----------------------------------------------------------------------------------------------


def resolve(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the shape of the weights it starts from, and the paper's rates for that size."""
    model = config.model
    if config.init_from:
        pretrained = read_config(start_of(config.init_from))
        if isinstance(pretrained, PretrainConfig) and pretrained.is_causal_alone:
            raise UserError(
                f"init_from {config.init_from}: a causal LM alone, which does not read what stands behind a token; "
                "expected a model with a discriminator, or a masked LM"
            )
        model = dataclasses.replace(model, **{key: getattr(pretrained.model, key) for key in SHAPE})
        model = dataclasses.replace(model, max_length=max(model.max_length, config.data.max_length))
    elif config.data.max_length > model.max_length:
        raise UserError(f"data.max_length {config.data.max_length} is more than the model's {model.max_length}")
    layers = discriminator_shape(model, 1).layers
    if config.freeze_layers > layers:
        raise UserError(f"freeze_layers {config.freeze_layers} is more than the model's {layers}")
    rate, decay = REWRITE if config.task == "rewrite" else PAPER[model.size]
    optimizer = dataclasses.replace(
        config.optimizer,
        learning_rate=config.optimizer.learning_rate or rate,
        layer_decay=config.optimizer.layer_decay or decay,
        weight_decay=config.optimizer.weight_decay or (0.01 if config.faithful else 0.0),
    )
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def initial_params(
    config: FinetuneConfig,
    head: dict[str, Any],
    tokenizer: Tokenizer,
    drawn: Params,
    mesh: Mesh,
    target: Tokenizer | None = None,
) -> Params:
    """The drawn weights with those of `init_from` in their place: embeddings and encoder, and the head where that run
    had the same task and outputs; otherwise a decoder starts as the encoder. Of another vocabulary or more positions
    what is new stays as it is drawn."""
    start = start_of(config.init_from)
    is_finetuned = (start / HEAD_FILE).is_file()
    params = (trained if is_finetuned else load_params)(start, mesh)[1]
    tower = params["discriminator"] if "discriminator" in params else params["generator"]
    embeddings, known = params["embeddings"], Tokenizer.load(start)
    if known.sha256 != tokenizer.sha256 or not same_shapes(embeddings, drawn["embeddings"]):
        kept = jax.tree.map(np.asarray, embeddings)
        embeddings = taken_embeddings(kept, drawn["embeddings"], *shared_tokens(known, tokenizer))
    taken = {"embeddings": embeddings, "discriminator": {"encoder": tower["encoder"]}}
    if config.task == "rewrite" and target and not takes_head(start, head):
        source = jax.tree.map(np.asarray, params["embeddings"])
        taken |= started_decoder(config.decoder, tower["encoder"], source, shared_tokens(known, target), drawn)
    if config.head.template:
        if "discriminator" not in params or "head" not in tower:
            raise UserError(f"init_from {config.init_from}: has no discriminator's head, which head.template asks")
        taken["discriminator"] = tower
    elif takes_head(start, head):
        taken |= {name: params[name] for name in params if name not in taken}
    return {**drawn, **taken}


def get_tokenizer(config: FinetuneConfig, examples: Sequence[Example]) -> Tokenizer:
    """The one that `data.tokenizer` names, else that of the pretrained weights, or for random weights a new one for the
    training texts."""
    data = config.data
    if pathlib.Path(data.tokenizer).exists():
        return Tokenizer.load(data.tokenizer, data.lowercase)
    if config.init_from:
        return Tokenizer.load(start_of(config.init_from))
    if holds_run(config.workdir):
        return kept_tokenizer(config.workdir)
    if jax.process_count() == 1:
        return train_tokenizer(config, examples)
    # trained in one process: training it twice may give two vocabularies
    agreed(lambda: str(train_tokenizer(config, examples).save(config.workdir)))
    return Tokenizer.load(config.workdir)


def train_tokenizer(config: FinetuneConfig, examples: Sequence[Example]) -> Tokenizer:
    data = config.data
    texts = texts_of(examples)
    if config.task == "rewrite" and not config.decoder.tokenizer:
        texts += targets_of(examples)
    return Tokenizer.train(data.tokenizer, texts, data.vocab_size, data.lowercase)


def teacher_of(config: FinetuneConfig) -> Classifier | None:
    if not config.teacher.path:
        return None
    workdir = as_workdir(config.teacher.path)
    teacher = load(workdir) if isinstance(read_config(workdir), FinetuneConfig) else None
    if not isinstance(teacher, Classifier):
        raise UserError(f"teacher.path {config.teacher.path}: expected the work directory of a classifier")
    if teacher.task.kind != config.head.kind:
        raise UserError(
            f"teacher.path {config.teacher.path}: its head.kind is {teacher.task.kind}, not {config.head.kind}"
        )
    return teacher


# -- the objective -----------------------------------------------------------------------------------------------------


def make_task(
    config: FinetuneConfig, tokenizer: Tokenizer, head: dict[str, Any], rows: TaskRows | None
) -> FinetuneTask:
    """The objective for a head as `TaskRows.head` describes it. Without rows it can do everything but read batches.
    Raises UserError for a metric that it does not have."""
    task = _make_task(config, tokenizer, head, rows)
    if task.metric not in task.metrics:
        raise UserError(f"metric {task.metric}: expected one of {', '.join(task.metrics)}")
    return task


def _make_task(
    config: FinetuneConfig, tokenizer: Tokenizer, head: dict[str, Any], rows: TaskRows | None
) -> FinetuneTask:
    common = {
        "encoder": discriminator_shape(config.model, tokenizer.vocab_size),
        "pad_id": tokenizer.pad_id,
        "sep_id": tokenizer.sep_id,
        "train": rows and rows.train,
        "dev": rows and rows.dev,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "faithful": config.faithful,
        "freeze_embeddings": config.freeze_embeddings,
        "freeze_layers": config.freeze_layers,
        "metric": config.metric or head["metric"],
    }
    match config.task:
        case "classify" if config.head.template:
            return TemplateTask(**common, classes=tuple(head["classes"]))
        case "classify":
            taught = {"teacher_weight": config.teacher.weight, "teacher_temperature": config.teacher.temperature}
            return ClassifyTask(
                **common,
                kind=config.head.kind,
                classes=tuple(head["classes"]),
                scale=head["scale"],
                style=config.head.style,
                **(taught if config.teacher.path else {}),
            )
        case "tag":
            return TagTask(
                **common,
                tags=tuple(head["classes"]),
                scheme=head["scheme"],
                constrained=config.head.constrained,
                max_length=config.data.max_length,
            )
        case "answer":
            return AnswerTask(
                **common,
                style=config.head.spans,
                no_answer=config.head.no_answer,
                null_threshold=head["null_threshold"],
                max_answer=config.head.max_answer,
                n_best=config.head.n_best,
                windows=rows and rows.windows,
            )
        case "rewrite":
            return RewriteTask(
                **common,
                **decoder_fields(config, tokenizer.vocab_size, head),
                tokenizer=rows and rows.target,
                references=rows.references if rows else (),
            )


def make_rows(
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    examples: tuple[list, list, BadRows],
    known: dict[str, Any] | None = None,
) -> TaskRows:
    """The rows of the task; `known` is the head of a model that is only evaluated."""
    data, size = config.data, config.batch_size
    match config.task:
        case "classify":
            teacher = None if known else teacher_of(config)
            rows = classify_rows(data, config.head, tokenizer, *examples, size, known, teacher)
            style = "template" if config.head.template else config.head.style
        case "tag":
            rows, style = tag_rows(data, tokenizer, *examples, size, known), "linear"
        case "answer":
            style, threshold = config.head.spans, config.head.null_threshold
            if threshold is None:
                threshold = known["null_threshold"] if known else NULL_THRESHOLDS[style]
            rows = answer_rows(data, config.head.no_answer, threshold, tokenizer, *examples, size)
        case "rewrite":
            style = "linear"
            if known:
                target = kept_target(finished(config.workdir), config, tokenizer)
            else:
                target = target_tokenizer(config, tokenizer, examples[0])
            rows = rewrite_rows(data, config.decoder, tokenizer, target, *examples, size)
    head = {"task": config.task, "kind": _kind(config), "style": style, **rows.head}
    if rows.dev is None or (rows.train is None and not known):
        raise UserError(f"{data.path}: no row is left to {'evaluate on' if rows.dev is None else 'train on'}")
    head["rows"] = known["rows"] if known else rows.train.rows.sha256(leave_out="teacher")
    return dataclasses.replace(rows, head=head, dev_sha256=sha256_of(examples[1]))


def _kind(config: FinetuneConfig) -> str:
    return "text" if config.task == "rewrite" else config.head.kind


def kind_of_rows(config: FinetuneConfig) -> str:
    """As `read_examples` wants it."""
    return {"tag": "tags", "answer": "answers"}.get(config.task) or _kind(config)


def check_format(config: FinetuneConfig) -> None:
    """Raises UserError for files that have no rows of the task. A model that came from elsewhere names none."""
    if config.data.format not in FORMATS[config.task]:
        expected = " or ".join(FORMATS[config.task])
        raise UserError(f"data.format {config.data.format}: the task {config.task} reads {expected}")


def check(config: FinetuneConfig) -> tuple[FinetuneConfig, Tokenizer, TaskRows, FinetuneTask]:
    """All rows and everything else, read and checked; writes nothing but, among several processes, a tokenizer."""
    config = resolve(config)
    check_format(config)
    examples = read_examples(config.data, kind_of_rows(config))
    tokenizer = get_tokenizer(config, examples[0])
    rows = make_rows(config, tokenizer, examples)
    return config, tokenizer, rows, make_task(config, tokenizer, rows.head, rows)


def plan(config: FinetuneConfig) -> Plan:
    """What the run would need; writes nothing."""
    mesh, imagined = plan_mesh(config)
    config, _, rows, task = check(config)
    return plan_run(config, task, rows.train.longest(), mesh, config.steps or 1, imagined)


def set_up(config: FinetuneConfig) -> tuple[Run, TaskRows]:
    """Reads and checks all rows and everything else before step 0."""
    with together():
        mesh = mesh_for(config)
        config, tokenizer, rows, task = check(config)
    keep_config(config, tokenizer, config.init_from or "data.tokenizer")
    agreed(keep_head, config, rows.head)
    agreed(keep_target, config, rows.target)
    epoch = rows.train.buckets.batches
    steps = config.steps or max(1, int(epoch * config.epochs))
    eval_every = config.eval.every or min(epoch, steps)
    every = eval_every if config.eval.patience else config.checkpoint.every or eval_every  # the best one must be kept
    lengths = rows.train.rows.lengths

    def initial(drawn: Params) -> Params:
        return initial_params(config, rows.head, tokenizer, drawn, mesh, rows.target)

    run = assemble(
        config,
        task,
        tokenizer,
        mesh,
        example=rows.train.longest(),
        steps=steps,
        flops_per_step=3.0 * config.batch_size * task.forward_flops(),
        tokens_per_step=config.batch_size * float(lengths.sum()) / len(lengths),
        eval_every=eval_every,
        save_every=every,
        patience=config.eval.patience,
        initial=initial if config.init_from else None,
        is_frozen=task.is_frozen,
    )
    return run, dataclasses.replace(rows, notes=(*rows.notes, *_start_notes(config, rows.head, tokenizer)))


def _start_notes(config: FinetuneConfig, head: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """What the weights that a run starts from do not make plain."""
    if not config.init_from:
        return []
    start, notes = start_of(config.init_from), []
    known = Tokenizer.load(start)
    if known.sha256 != tokenizer.sha256:
        fresh = tokenizer.vocab_size - len(shared_tokens(known, tokenizer)[1])
        notes.append(f"{fresh:,} of {tokenizer.vocab_size:,} tokens are new to the weights")
    if takes_head(start, head):
        notes.append(f"the head too is taken from {start}, whose outputs are the same")
    elif (start / HEAD_FILE).is_file() and not config.head.template:
        notes.append(f"the head of {start} is left out: its outputs are others")
    trained_length = read_config(start).data.max_length
    if config.data.max_length > trained_length:
        notes.append(f"the weights were trained on rows of {trained_length} tokens; later positions are new to them")
    return notes


# -- afterwards --------------------------------------------------------------------------------------------------------


def load(workdir: str | os.PathLike, compute_dtype: str | None = None) -> "Classifier | Tagger | Reader | Rewriter":
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


def evaluate_trained(config: FinetuneConfig, step: int | None = None) -> tuple[FinetuneTask, TaskRows, Record]:
    """The trained model of `config.workdir`, or what it was at a step, on the dev rows that `data` names."""
    workdir, mesh = finished(config.workdir), mesh_for(config)
    check_format(config)
    tokenizer, head = Tokenizer.load(workdir), read_head(workdir)
    whole = config.data.path != read_config(workdir).data.path
    examples = read_examples(config.data, kind_of_rows(config), train=False, whole=whole)
    rows = make_rows(config, tokenizer, examples, head)
    task = make_task(config, tokenizer, head, rows)
    step, params = trained(workdir, mesh, step)
    return task, rows, Record(step, "eval", *make_evaluate(task, mesh)(params))
