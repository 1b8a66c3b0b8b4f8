"""Trained models: loaded from their work directories, converted to and from other formats, and exported."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from electrax.config import AnyPath, UserError, to_toml
from electrax.convert import huggingface
from electrax.convert.export import ExportConfig, export_stablehlo
from electrax.convert.model import Head, Model
from electrax.convert.onnx import export_onnx
from electrax.convert.weights import write_tree
from electrax.data.tokenizer import Tokenizer
from electrax.experiment import finetuned, pretrain
from electrax.experiment.config import FinetuneConfig, PretrainConfig, computed_in, finished, read_config
from electrax.experiment.foreign import REPORT_FILE, ConvertConfig, as_workdir, convert_foreign
from electrax.experiment.head import read_head
from electrax.experiment.objective import make_task
from electrax.experiment.rewrite import TARGET_FOLDER
from electrax.experiment.run import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, load_params, trained
from electrax.inference.classifier import Classifier
from electrax.inference.model import PretrainedModel
from electrax.inference.reader import Reader
from electrax.inference.rewriter import Rewriter
from electrax.inference.tagger import Tagger
from electrax.models.products import rounded_layers
from electrax.storage import new_directory, on_this_machine, path_of, write_atomically
from electrax.tasks.base import Params
from electrax.tasks.classify import ClassifyTask
from electrax.tasks.finetune import FinetuneTask
from electrax.tasks.pretrain import PretrainTask
from electrax.tasks.tag import TagTask


def load(
    source: str | os.PathLike, compute_dtype: str | None = None
) -> PretrainedModel | Classifier | Tagger | Reader | Rewriter:
    """A trained model: from the work directory of a pretraining its newest whole checkpoint, of a fine-tuning the one
    its results were measured on (of several seeds the best); from a Hugging Face directory or `hub:NAME` (fetched
    where the cache lacks it), or a TensorFlow checkpoint of ELECTRA or BERT. It computes in float32 or bfloat16, as
    `compute_dtype` says or it was trained."""
    workdir = as_workdir(source)
    config = computed_in(read_config(workdir), compute_dtype)
    if isinstance(config, FinetuneConfig):
        return finetuned.load(workdir, compute_dtype)
    task, tokenizer, params = _pretrained(workdir, config)
    return PretrainedModel(
        rounded_layers(params, config.model.compute_dtype),
        tokenizer,
        task.generator if "generator" in params and not task.two_tower else None,
        task.discriminator if task.detects else None,
        config.data.max_length,  # later positions were never trained
        # Electric's logits lack the generator's part
        detects=task.detects and not task.electric and "head" in params["discriminator"],
        generator_kind=task.generator_kind,
    )


def _pretrained(workdir: AnyPath, config: PretrainConfig) -> tuple[PretrainTask, Tokenizer, Params]:
    """The objective, and the parameters with all that the generator computes with, where there is one."""
    tokenizer, params = Tokenizer.load(workdir), load_params(workdir)[1]
    task = pretrain.make_task(config, tokenizer.vocab_size, tokenizer.special_ids, None)
    whole = {"generator": task.generator_params(params)} if "generator" in params else {}
    return task, tokenizer, {**params, **whole}


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Writes a work directory as a Hugging Face directory, everything else as a work directory, all or nothing.
    Returns the report that is written beside the result."""
    source = path_of(config.source)
    if not (source / CONFIG_FILE).is_file():
        return convert_foreign(config)
    if config.generator or config.tokenizer or config.heads or config.lowercase is not None:
        raise UserError(
            "generator, tokenizer, heads and lowercase are for a source that is not an electrax work directory"
        )
    with new_directory(on_this_machine(config.out)) as directory:
        model, tokenizer = to_model(source)
        written = huggingface.write(directory, model, tokenizer, read_config(source).data.max_length)
        report = {"from": config.source, "to": "Hugging Face", "written": written}
        write_atomically(directory / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    return report


def to_model(workdir: AnyPath) -> tuple[Model, Tokenizer]:
    """The trained model of a run. Raises UserError for one that no other format has."""
    config = read_config(workdir)
    if isinstance(config, FinetuneConfig):
        workdir = finished(workdir)
        config, tokenizer, head = read_config(workdir), Tokenizer.load(workdir), read_head(workdir)
        task = make_task(config, tokenizer, head, None)
        if config.task == "rewrite":
            raise UserError(f"{workdir}: a model of the task rewrite has no counterpart in Transformers")
        if config.head.template:  # its head is still the discriminator's
            return Model(trained(workdir)[1], task.encoder), tokenizer
        kept = Head(head["task"], head["kind"], head["style"], tuple(head["classes"]))
        return Model(_with_all_in_weights(trained(workdir)[1], task), task.encoder, head=kept), tokenizer
    kind = config.generator.kind
    if config.objective.kind == "electric" or kind not in ("masked", "shared"):
        what = "Electric" if config.objective.kind == "electric" else f"a {kind.replace('_', '-')} generator"
        raise UserError(f"{workdir}: {what} has no counterpart in Transformers' ELECTRA")
    task, tokenizer, params = _pretrained(workdir, config)
    encoder = task.discriminator if task.detects else None
    return Model(params, encoder, task.generator if "generator" in params else None), tokenizer


def _with_all_in_weights(params: Params, task: FinetuneTask) -> Params:
    """What electrax keeps beside the weights and other libraries do not: the scale of a number, and the type of token
    that the reference's taggers give to every word."""
    if isinstance(task, ClassifyTask) and task.kind == "number":
        output = jax.tree.map(lambda leaf: leaf * task.scale, params["head"]["output"])
        return {**params, "head": {**params["head"], "output": output}}
    if isinstance(task, TagTask) and task.faithful:
        return {**params, "embeddings": {**params["embeddings"], "type": params["embeddings"]["type"][::-1]}}
    return params


def export(config: ExportConfig) -> pathlib.Path:
    """Makes the directory `out` of a trained model in the format that the config names, all or nothing. For a
    fine-tuning over several seeds it is the best one."""
    out = on_this_machine(config.out)
    match config.format:
        case "stablehlo":
            return export_stablehlo(_exportable(config), out)
        case "onnx":
            return export_onnx(_exportable(config), out, config.int8)
        case "safetensors":
            return _export_workdir(as_workdir(config.model), out, "bfloat16" if config.bf16 else "float32")


def _exportable(config: ExportConfig) -> PretrainedModel | Classifier | Tagger | Reader:
    model = load(config.model)
    if isinstance(model, Rewriter):
        raise UserError(f"{config.model}: decoding has no form in {config.format}; expected --format safetensors")
    return model


def _export_workdir(workdir: AnyPath, out: pathlib.Path, dtype: str) -> pathlib.Path:
    """What `load` needs of a run, without its checkpoints."""
    config = read_config(workdir)
    is_finetuned = isinstance(config, FinetuneConfig)
    if is_finetuned:
        workdir = finished(workdir)
        config = read_config(workdir)
    params = (trained if is_finetuned else load_params)(workdir)[1]
    tokenizer, head = Tokenizer.load(workdir), read_head(workdir) if is_finetuned else None
    with new_directory(out) as directory:
        tokenizer.save(directory)
        if (workdir / TARGET_FOLDER).is_dir():
            (directory / TARGET_FOLDER).mkdir()
            Tokenizer.load(workdir / TARGET_FOLDER).save(directory / TARGET_FOLDER)
        write_tree(directory / WEIGHTS_FILE, params, {"tokenizer": tokenizer.sha256}, dtype)
        if head:
            write_atomically(directory / HEAD_FILE, json.dumps(head, indent=1) + "\n")
        write_atomically(directory / CONFIG_FILE, to_toml(dataclasses.replace(config, workdir=str(out))))
    return out
