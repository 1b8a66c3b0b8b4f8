"""Models of other formats as work directories.

Everything in electrax that takes a trained model takes a work directory. A model of another format is converted into
one first: by the command `convert` into a directory of its own, by `load` and `init_from` into the user's cache.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from electrax.config import AnyPath, UserError, to_toml
from electrax.convert import gpt2, huggingface, tensorflow
from electrax.convert.config_json import infer_config
from electrax.convert.hub import HUB_PREFIX, TOKENIZERS, from_hub, is_name
from electrax.convert.model import CONSTANT, THE_SAME, Head, Model
from electrax.convert.weights import write_tree
from electrax.data.tokenizer import LONGEST_WORD, Tokenizer
from electrax.experiment.config import (
    NULL_THRESHOLDS,
    AnyConfig,
    DataConfig,
    FinetuneConfig,
    HeadConfig,
    PretrainConfig,
)
from electrax.experiment.examples import ExamplesConfig
from electrax.experiment.run import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from electrax.models.encoder import EncoderConfig
from electrax.models.sizes import SIZES, GeneratorConfig, ModelConfig
from electrax.storage import cache_folder, new_directory, on_this_machine, own_cache, path_of, write_atomically
from electrax.tasks.pretrain import ObjectiveConfig
from electrax.tasks.tags import marks_spans

REPORT_FILE = "conversion.json"
CACHE_VERSION = 2  # of what is kept in the user's cache
# why a tensor is left out without a word: nothing that was learnt is lost
UNTOLD = (CONSTANT, *(reason for _, reason in tensorflow.NOT_NEEDED))
MOST_NAMES = 3  # of tensors left out for one reason
log = logging.getLogger("electrax")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """A work directory becomes a Hugging Face directory, every other model a work directory."""

    source: str = ""
    out: str = ""  # a new or empty directory
    generator: str = ""  # of a discriminator: Hugging Face directory, or hub:NAME
    tokenizer: str = ""  # tokenizer file or folder; default: the one beside the weights
    lowercase: bool | None = None  # for a vocab.txt; default: as its tokenizer_config.json, or its capitals, say
    heads: int = 0  # of a TensorFlow checkpoint without a bert_config.json; 0: 64 wide each


def as_workdir(source: str | os.PathLike) -> AnyPath:
    """The work directory itself, or for a model of another format the one in the cache that it was converted into."""
    path = path_of(source)
    if (path / CONFIG_FILE).is_file():
        return path
    path = find(os.fspath(source))
    fingerprint = _fingerprint(path)
    try:
        kept = own_cache("models") / fingerprint
    except OSError as error:
        raise UserError(f"{cache_folder()}: {error.strerror}") from None
    try:
        if not (kept / CONFIG_FILE).is_file():
            report = convert_foreign(ConvertConfig(source=str(path), out=str(kept)))
            _warn(os.fspath(source), report["left_out"])
    except OSError as error:
        raise UserError(f"{kept}: {error.strerror}") from None
    except UserError:
        if not (kept / CONFIG_FILE).is_file():  # no other process has converted it meanwhile
            raise
    return kept


def _warn(source: str, left_out: Mapping[str, str]) -> None:
    told = {name: why for name, why in left_out.items() if why not in UNTOLD and not why.startswith(THE_SAME)}
    for line in by_reason(told):
        log.warning("%s: left out %s", source, line)


def by_reason(left_out: Mapping[str, str]) -> list[str]:
    """A line for each reason, with some of the tensors left out for it."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        more = f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else ""
        lines.append(f"{', '.join(names[:MOST_NAMES])}{more}: {reason}")
    return lines


def find(source: str) -> pathlib.Path:
    """Where a model of another format lies: a directory, a TensorFlow checkpoint, or hub:NAME on the Hugging Face hub,
    without which nothing is fetched."""
    if source.startswith(HUB_PREFIX):
        return from_hub(source.removeprefix(HUB_PREFIX))
    path = pathlib.Path(source)
    if tensorflow.is_checkpoint(path) or huggingface.is_directory(path):
        return path
    if path.exists():
        expected = "config.toml (electrax), config.json (Hugging Face) or *.index (TensorFlow)"
        raise UserError(f"{path}: holds no model; expected a directory with {expected}")
    hint = f"; a model of the Hugging Face hub would be {HUB_PREFIX}{source}" if is_name(source) else ""
    raise UserError(f"{path}: no such file or directory{hint}")


def _fingerprint(path: pathlib.Path) -> str:
    """Changes with every file of the model."""
    folder = path if path.is_dir() else path.parent
    if tensorflow.is_checkpoint(path):
        beside = [folder / name for name in (*TOKENIZERS, huggingface.SETTINGS_FILE)]
        files = [*tensorflow.files_of(path), *(file for file in beside if file.is_file())]
    else:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
    stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps([CACHE_VERSION, str(path.resolve()), stats]).encode()).hexdigest()[:32]


def convert_foreign(config: ConvertConfig) -> dict[str, Any]:
    """Makes a work directory of a model of another format, all or nothing; returns the report written into it."""
    out = on_this_machine(config.out)
    with new_directory(out) as directory:
        path = find(config.source)
        model, tokenizer = read(path, config)
        report = model.report(config.source) | {"to": "electrax"}
        max_length = main_tower(model).max_length
        if not tensorflow.is_checkpoint(path):
            max_length = huggingface.row_length(path, max_length)
        write_workdir(directory, to_config(model, tokenizer, out, max_length), tokenizer, model, report)
    return report


def read(path: pathlib.Path, config: ConvertConfig) -> tuple[Model, Tokenizer]:
    """A model of another format and its tokenizer, which must have a row of the word table for every token, and no
    fewer tokens."""
    if tensorflow.is_checkpoint(path):
        if config.generator:
            raise UserError(f"generator {config.generator}: has no use, as {path} is a TensorFlow checkpoint")
        model, folder = _from_tensorflow(path, config.heads), path if path.is_dir() else path.parent
        longest_word = LONGEST_WORD
    else:
        if config.heads:
            raise UserError(f"heads {config.heads}: has no use, as {path} is no TensorFlow checkpoint")
        if gpt2.is_directory(path):
            if config.generator or config.lowercase is not None:
                raise UserError(f"generator and lowercase have no use, as {path} is GPT-2")
            return gpt2.read(path, pathlib.Path(config.tokenizer) if config.tokenizer else path)
        model, folder = huggingface.read(path, find(config.generator) if config.generator else None), path
        longest_word = huggingface.LONGEST_WORD
    given = pathlib.Path(config.tokenizer) if config.tokenizer else folder
    tokenizer = huggingface.read_tokenizer(given, config.lowercase, longest_word)
    rows = main_tower(model).vocab_size
    if tokenizer.vocab_size != rows:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its word table {rows} rows")
    return model, tokenizer


def _from_tensorflow(path: pathlib.Path, heads: int) -> Model:
    """ELECTRA's two towers, or BERT's one with its masked-LM head."""
    checkpoint, said = tensorflow.read_checkpoint(path), tensorflow.read_config(path)
    own_generator = tensorflow.has_own_generator(checkpoint)
    towers, left_out = tensorflow.towers(checkpoint)
    del checkpoint  # so that each variable's memory goes with its place in a tower
    heads = heads or said.get("num_attention_heads", 0)
    unknown = sorted(name for name, reason in left_out.items() if reason == "unknown")
    if unknown:
        raise UserError(f"{path}: {len(unknown)} variables have no place in the model: {', '.join(unknown[:5])}")
    models = {}
    for name, tensors in towers.items():
        family = "bert" if name == "bert" else "electra"
        config = {**said, **infer_config(family, tensors)}
        if heads and not (name == "generator" and own_generator):
            config["num_attention_heads"] = heads
        models[name] = huggingface.read_tower(config, tensors, str(path))
    if len(models) == 2:
        model = huggingface.pair(models["discriminator"], models["generator"], str(path))
    else:
        (model,) = models.values()
    return dataclasses.replace(model, left_out={**left_out, **model.left_out})


def main_tower(model: Model) -> EncoderConfig:
    tower = model.encoder or model.generator
    assert tower is not None
    return tower


# -- into a work directory ---------------------------------------------------------------------------------------------


def write_workdir(
    directory: pathlib.Path, config: AnyConfig, tokenizer: Tokenizer, model: Model, report: dict[str, Any]
) -> None:
    tokenizer.save(directory)
    write_tree(directory / WEIGHTS_FILE, model.params, {"tokenizer": tokenizer.sha256})
    if model.head:
        write_atomically(directory / HEAD_FILE, json.dumps(describe(model.head), indent=1) + "\n")
    write_atomically(directory / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    write_atomically(directory / CONFIG_FILE, to_toml(config))


def to_config(model: Model, tokenizer: Tokenizer, workdir: pathlib.Path, max_length: int) -> AnyConfig:
    """The config of a run that would have made such a model on rows of `max_length`, as far as its shape says; how long
    it was is not known."""
    tower = main_tower(model)
    shape = ModelConfig(size=_size_of(tower), **_fields(tower, ModelConfig))
    if model.head:
        is_answer = model.head.task == "answer"
        texts = ("question", "context") if is_answer else ("text",)
        texts = ("context", "choice1", "choice2") if model.head.kind == "choice" else texts
        return FinetuneConfig(
            task=model.head.task,
            workdir=str(workdir),
            model=shape,
            head=HeadConfig(
                kind=model.head.kind,
                style="linear" if is_answer else model.head.style,
                spans="plain" if is_answer else "joint",
                constrained=False,  # as the model was trained
            ),
            data=ExamplesConfig(text=texts, max_length=max_length, max_query=min(64, max_length // 2)),
        )
    generator = GeneratorConfig(kind="causal" if tower.body == "gpt2" else "masked")
    if model.generator and model.encoder:
        embeddings = "separate" if model.separate_embeddings else "shared"
        generator = GeneratorConfig(embeddings=embeddings, **_fields(model.generator, GeneratorConfig))
    return PretrainConfig(
        workdir=str(workdir),
        steps=1,
        model=shape,
        generator=generator,
        objective=ObjectiveConfig(kind="rtd" if model.encoder else "mlm"),
        data=DataConfig(vocab_size=tokenizer.vocab_size, layout="segments", max_length=max_length),
    )


def _fields(tower: EncoderConfig, cls: type) -> dict[str, Any]:
    """What a section of the config and a tower have in common."""
    return {f.name: getattr(tower, f.name) for f in dataclasses.fields(cls) if hasattr(tower, f.name)}


def _size_of(tower: EncoderConfig) -> str:
    """The size of the paper with this depth and width, or else the next by width: fine-tuning's rates depend on it."""
    exact = [name for name, s in SIZES.items() if (s.layers, s.width) == (tower.layers, tower.width)]
    return exact[0] if exact else min(SIZES, key=lambda name: abs(SIZES[name].width - tower.width))


def describe(head: Head) -> dict[str, Any]:
    """head.json of a converted model."""
    said = {"task": head.task, "kind": head.kind, "style": head.style, "classes": list(head.classes), "rows": ""}
    match head.task:
        case "classify":
            metrics = {"classes": "accuracy", "choice": "accuracy", "number": "spearman", "labels": "micro_f1"}
            return said | {"scale": 1.0, "metric": metrics[head.kind]}
        case "tag":
            scheme = _scheme(head.classes)
            return said | {"scheme": scheme, "metric": "f1" if scheme else "accuracy"}
    return said | {"null_threshold": NULL_THRESHOLDS["plain"], "metric": "f1"}


def _scheme(tags: tuple[str, ...]) -> str | None:
    """That of a set of tags, by the prefixes in it."""
    prefixes = {tag.partition("-")[0] for tag in tags}
    if not marks_spans(tags) or prefixes == {"O"}:
        return None
    return "BIOES" if prefixes & {"E", "S"} else "IOB2" if "B" in prefixes else "IO"
