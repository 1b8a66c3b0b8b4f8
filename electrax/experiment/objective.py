"""What a fine-tuning learns: the task of a config, the rows that it reads, and its head."""

from typing import Any

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import FinetuneConfig
from electrax.experiment.rewrite import decoder_fields
from electrax.experiment.rows import TaskRows
from electrax.models.sizes import discriminator_shape
from electrax.tasks.answer import AnswerTask
from electrax.tasks.classify import ClassifyTask
from electrax.tasks.finetune import FinetuneTask
from electrax.tasks.rewrite import RewriteTask
from electrax.tasks.tag import TagTask
from electrax.tasks.template import TemplateTask

# data.format of the rows that a task learns from
FORMATS = {
    "classify": ("table", "glue"),
    "tag": ("conll", "conllu", "table"),
    "answer": ("squad", "mrqa", "table"),
    "rewrite": ("table", "parallel"),
}


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


def kind_of(config: FinetuneConfig) -> str:
    """That of a head, which stands in head.json."""
    return "text" if config.task == "rewrite" else config.head.kind


def kind_of_rows(config: FinetuneConfig) -> str:
    """As `read_examples` wants it."""
    return {"tag": "tags", "answer": "answers"}.get(config.task) or kind_of(config)


def check_format(config: FinetuneConfig) -> None:
    """Raises UserError for files that have no rows of the task. A model that came from elsewhere names none."""
    if config.data.format not in FORMATS[config.task]:
        expected = " or ".join(FORMATS[config.task])
        raise UserError(f"data.format {config.data.format}: the task {config.task} reads {expected}")
