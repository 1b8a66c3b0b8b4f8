"""Models of other formats as work directories.

Everything in electrax that takes a trained model takes a work directory. A model of another format is converted into
one first: by the command `convert` into a directory of its own, by `load` and `init_from` into the user's cache.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from electrax.config import UserError, to_toml
from electrax.convert import huggingface, tensorflow
from electrax.convert.model import Head, Model
from electrax.convert.weights import write_tree
from electrax.data.encoded import cache_folder
from electrax.data.shards import new_directory, write_atomically
from electrax.data.tokenizer import Tokenizer
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
from electrax.tasks.pretrain import ObjectiveConfig
from electrax.tasks.tags import marks_spans

REPORT_FILE = "conversion.json"
CACHE_VERSION = 1  # of what is kept in the user's cache


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """A work directory becomes a Hugging Face directory, every other model a work directory."""

    source: str = ""
    out: str = ""  # a new or empty directory
    generator: str = ""  # Hugging Face directory of the generator of a discriminator
    tokenizer: str = ""  # tokenizer file or folder; default: the one beside the weights
    lowercase: bool = True  # for a vocab.txt beside a TensorFlow checkpoint


def as_workdir(source: str | os.PathLike) -> pathlib.Path:
    """The work directory itself, or for a model of another format the one in the cache that it was converted into."""
    path = pathlib.Path(source)
    if (path / CONFIG_FILE).is_file():
        return path
    path = find(os.fspath(source))
    kept = cache_folder() / "models" / _fingerprint(path)
    if not (kept / CONFIG_FILE).is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        convert_foreign(ConvertConfig(source=str(path), out=str(kept)))
    return kept


def find(source: str) -> pathlib.Path:
    """Where a model of another format lies: a directory, a TensorFlow checkpoint, or a name on the Hugging Face hub."""
    path = pathlib.Path(source)
    if tensorflow.is_checkpoint(path) or huggingface.is_directory(path):
        return path
    if path.exists():
        expected = "config.toml (electrax), config.json (Hugging Face) or *.index (TensorFlow)"
        raise UserError(f"{path}: holds no model; expected a directory with {expected}")
    found = huggingface.from_hub(source)
    if found is None:
        raise UserError(f"{path}: no such file or directory")
    return found


def _fingerprint(path: pathlib.Path) -> str:
    """Changes with every file of the model."""
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps([CACHE_VERSION, str(path.resolve()), stats]).encode()).hexdigest()[:32]


def convert_foreign(config: ConvertConfig) -> dict[str, Any]:
    """Makes a work directory of a model of another format, all or nothing; returns the report written into it."""
    model, tokenizer = read(find(config.source), config)
    out = pathlib.Path(config.out)
    report = model.report(config.source) | {"to": "electrax"}
    with new_directory(out) as directory:
        write_workdir(directory, to_config(model, tokenizer, out), tokenizer, model, report)
    return report


def read(path: pathlib.Path, config: ConvertConfig) -> tuple[Model, Tokenizer]:
    """A model of another format and its tokenizer, which must have a row of the word table for every token, and no
    fewer tokens."""
    if tensorflow.is_checkpoint(path):
        model, folder = _from_tensorflow(path), path if path.is_dir() else path.parent
        tokenizer = Tokenizer.load(config.tokenizer or folder, config.lowercase)
    else:
        model = huggingface.read(path, pathlib.Path(config.generator) if config.generator else None)
        given = config.tokenizer
        tokenizer = Tokenizer.load(given, config.lowercase) if given else huggingface.read_tokenizer(path)
    rows = main_tower(model).vocab_size
    if tokenizer.vocab_size != rows:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its word table {rows} rows")
    return model, tokenizer


def _from_tensorflow(path: pathlib.Path) -> Model:
    """ELECTRA's two towers, or BERT's one with its masked-LM head."""
    towers, left_out = tensorflow.towers(tensorflow.read_checkpoint(path))
    unknown = sorted(name for name, reason in left_out.items() if reason == "unknown")
    if unknown:
        raise UserError(f"{path}: {len(unknown)} variables have no place in the model: {', '.join(unknown[:5])}")
    models = {}
    for name, tensors in towers.items():
        family = "bert" if name == "bert" else "electra"
        models[name] = huggingface.read_tower(huggingface.infer_config(family, tensors), tensors, str(path))
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
    write_tree(directory / WEIGHTS_FILE, model.params)
    if model.head:
        write_atomically(directory / HEAD_FILE, json.dumps(describe(model.head), indent=1) + "\n")
    write_atomically(directory / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    write_atomically(directory / CONFIG_FILE, to_toml(config))


def to_config(model: Model, tokenizer: Tokenizer, workdir: pathlib.Path) -> AnyConfig:
    """The config of a run that would have made such a model, as far as its shape says; its length is not known."""
    tower = main_tower(model)
    shape = ModelConfig(size=_size_of(tower), **_fields(tower, ModelConfig))
    if model.head:
        is_answer = model.head.task == "answer"
        choice = model.head.kind == "choice"
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
            data=ExamplesConfig(
                text=("context", "choice1", "choice2") if choice else ("text",), max_length=tower.max_length
            ),
        )
    generator = GeneratorConfig()
    if model.generator and model.encoder:
        embeddings = "separate" if model.separate_embeddings else "shared"
        generator = GeneratorConfig(embeddings=embeddings, **_fields(model.generator, GeneratorConfig))
    return PretrainConfig(
        workdir=str(workdir),
        steps=1,
        model=shape,
        generator=generator,
        objective=ObjectiveConfig(kind="rtd" if model.encoder else "mlm"),
        data=DataConfig(vocab_size=tokenizer.vocab_size, layout="segments", max_length=tower.max_length),
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
