"""A fine-tuning run put together: its config, rows, objective and the weights it starts from."""

import dataclasses
from typing import Any

from electrax.config import AnyPath, UserError
from electrax.data.examples import BadRows
from electrax.data.outside import read_object
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import (
    NULL_THRESHOLDS,
    FinetuneConfig,
    PretrainConfig,
    computed_in,
    finished,
    read_config,
)
from electrax.experiment.examples import ExamplesConfig, hold_out, read_examples, sha256_of
from electrax.experiment.finetuned import load
from electrax.experiment.foreign import as_workdir
from electrax.experiment.head import keep_head, read_head
from electrax.experiment.initial import get_tokenizer, initial_params, start_notes
from electrax.experiment.objective import check_format, kind_of, kind_of_rows, make_task
from electrax.experiment.plan import Plan, plan_mesh, plan_run
from electrax.experiment.rewrite import keep_target, kept_target, rewrite_rows, target_tokenizer
from electrax.experiment.rows import TaskRows, answer_rows, classify_rows, tag_rows
from electrax.experiment.run import RESULTS_FILE, Run, assemble, check_dropout, keep_config, mesh_for, trained
from electrax.experiment.start import start_of
from electrax.inference.classifier import Classifier
from electrax.models.attention import GPU_ATTENTION
from electrax.models.sizes import discriminator_shape
from electrax.tasks.base import Params
from electrax.tasks.finetune import FinetuneTask
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
KERNEL_MULTIPLE = 16  # of tokens in a row, for kernels of a GPU
REWRITE = (5e-4, 1.0)  # a decoder has more to learn than a head
# keys of [model] that belong to the pretrained weights; the others are free in fine-tuning
SHAPE = ("size", "body", "layers", "width", "heads", "feed_forward", "embedding_width", "max_length", "qk_norm")


def resolve(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the shape of the weights it starts from, and the paper's rates for that size. Raises UserError
    for what no training can have."""
    if config.checkpoint.every and config.eval.patience:
        raise UserError("checkpoint.every: with eval.patience each evaluated model is saved; leave one of them out")
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


def with_multiple(config: FinetuneConfig) -> ExamplesConfig:
    """`config.data` with what row lengths are multiples of: attention and residuals of a GPU alone take no others.
    Raises UserError where the longest row is none."""
    model, data = config.model, config.data
    of_gpu = model.attention in GPU_ATTENTION or model.residual == "fused"
    multiple = data.length_multiple or (KERNEL_MULTIPLE if of_gpu else 1)
    longest = {"data.max_length": data.max_length}
    if config.task == "rewrite":
        longest["decoder.max_length"] = config.decoder.max_length
    for key, tokens in longest.items():
        if tokens % multiple:
            why = "" if data.length_multiple else ", as model.attention or model.residual of a GPU want"
            raise UserError(f"{key} {tokens}: expected a multiple of data.length_multiple, {multiple}{why}")
    return dataclasses.replace(data, length_multiple=multiple)


def make_rows(
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    examples: tuple[list, list, BadRows],
    known: dict[str, Any] | None = None,
) -> TaskRows:
    """The rows of the task; `known` is the head of a model that is only evaluated."""
    data, size = with_multiple(config), config.batch_size
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
    head = {"task": config.task, "kind": kind_of(config), "style": style, **rows.head}
    if rows.dev is None or (rows.train is None and not known):
        raise UserError(f"{data.path}: no row is left to {'evaluate on' if rows.dev is None else 'train on'}")
    head["rows"] = known["rows"] if known else rows.train.rows.sha256(leave_out="teacher")
    return dataclasses.replace(rows, head=head, dev_sha256=sha256_of(examples[1]))


def check(config: FinetuneConfig) -> tuple[FinetuneConfig, Tokenizer, TaskRows, FinetuneTask]:
    """All rows and everything else, read and checked; writes nothing but, among several processes, a tokenizer."""
    config = resolve(config)
    check_format(config)
    examples = read_examples(config.data, kind_of_rows(config))
    tokenizer = get_tokenizer(config, examples[0])
    rows = make_rows(config, tokenizer, examples)
    return config, tokenizer, rows, make_task(config, tokenizer, rows.head, rows)


def steps_of(config: FinetuneConfig, rows: TaskRows) -> int:
    return config.steps or max(1, int(rows.train.buckets.batches * config.epochs))


def plan(config: FinetuneConfig) -> Plan:
    """What the run would need; writes nothing."""
    mesh, imagined = plan_mesh(config)
    config, _, rows, task = check(config)
    return plan_run(config, task, rows.train.longest(), mesh, config.steps or 1, imagined)


def set_up(config: FinetuneConfig, early: bool = False) -> tuple[Run, TaskRows]:
    """Reads and checks all rows and everything else before step 0; `early` as in assemble."""
    with together():
        mesh = mesh_for(config)
        check_dropout(config)
        config, tokenizer, rows, task = check(config)
    epoch, steps = rows.train.buckets.batches, steps_of(config, rows)
    keep_config(config, tokenizer, config.init_from or "data.tokenizer", steps)
    agreed(keep_head, config, rows.head)
    agreed(keep_target, config, rows.target)
    eval_every = config.eval.every or min(epoch, steps)

    def initial(drawn: Params) -> Params:
        return initial_params(config, rows.head, tokenizer, drawn, mesh, rows.target)

    run = assemble(
        config,
        task,
        tokenizer,
        mesh,
        example=rows.train.longest(),
        steps=steps,
        flops_per_step=config.batch_size * task.train_flops(),
        tokens_per_step=config.batch_size * float(rows.train.rows.text_lengths.sum()) / len(rows.train.rows),
        eval_every=eval_every,
        save_every=config.checkpoint.every or eval_every,  # with patience the best one must be kept
        patience=config.eval.patience,
        initial=initial if config.init_from else None,
        is_frozen=task.is_frozen,
        early=early,
    )
    return run, dataclasses.replace(rows, notes=(*rows.notes, *start_notes(config, rows.head, tokenizer)))


def _dev_rows_of(workdir: AnyPath) -> str:
    """The hash of the rows that a finished run was evaluated on."""
    results = workdir / RESULTS_FILE
    return read_object(results).get("dev_rows", "") if results.is_file() else ""


def evaluate_trained(config: FinetuneConfig, step: int | None = None) -> tuple[FinetuneTask, TaskRows, Record]:
    """The trained model of `config.workdir`, or what it was at a step, on the dev rows that `data` names."""
    config = computed_in(config, None)
    workdir, mesh = finished(config.workdir), mesh_for(config)
    check_format(config)
    tokenizer, head = Tokenizer.load(workdir), read_head(workdir)
    kind, was = kind_of_rows(config), read_config(workdir).data
    _, dev, bad = read_examples(config.data, kind, train=False, whole=config.data.path != was.path)
    # a file of another name may be the one that the model was trained on
    held_out = hold_out(dev, was.holdout, kind)[1]
    if sha256_of(held_out) == _dev_rows_of(workdir):
        dev = held_out
    examples = ([], dev, bad)
    rows = make_rows(config, tokenizer, examples, head)
    task = make_task(config, tokenizer, head, rows)
    step, params = trained(workdir, mesh, step)
    return task, rows, Record(step, "eval", *make_evaluate(task, mesh)(params))
