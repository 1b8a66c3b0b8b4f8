"""Hugging Face directories: Transformers' ELECTRA and BERT, read and written."""

import dataclasses
import json
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from electrax.config import UserError
from electrax.convert import names
from electrax.convert.config_json import (
    CONFIG_FILE,
    HEADS,
    PAIR,
    SIZES,
    architecture_of,
    config_of,
    encoder_of,
    family_of,
    head_of,
    read_config,
    read_json,
)
from electrax.convert.model import Head, Model, account
from electrax.convert.weights import read_weights, write_safetensors
from electrax.data.tokenizer import HUGGING_FACE_FILE, VOCABULARY_FILE, Tokenizer
from electrax.models.encoder import EncoderConfig
from electrax.storage import write_atomically
from electrax.tasks.base import Params

SETTINGS_FILE = "tokenizer_config.json"
SHORTEST_ROW = 8  # tokens, fewer than which no run takes
LONGEST_WORD = 100  # characters, beyond which Transformers takes a word for unknown


def is_directory(path: pathlib.Path) -> bool:
    """Whether it is one model, or the folders of a discriminator and its generator."""
    return (path / CONFIG_FILE).is_file() or all((path / name / CONFIG_FILE).is_file() for name in PAIR)


def read(path: pathlib.Path, generator: pathlib.Path | None = None) -> Model:
    """The model of a directory. Two folders `discriminator` and `generator` in it, or a `generator` beside it, become
    one pretraining tree. Raises UserError where anything in it has no place in electrax."""
    if not (path / CONFIG_FILE).is_file() and is_directory(path):
        if generator is not None:
            raise UserError(f"generator {generator}: has no use, as {path} holds a generator already")
        path, generator = (path / name for name in PAIR)
    model = read_tower(read_config(path), read_weights(path), str(path))
    if generator is None:
        return model
    return pair(model, read_tower(read_config(generator), read_weights(generator), str(generator)), str(generator))


def read_tower(config: Mapping[str, Any], tensors: dict[str, np.ndarray], source: str) -> Model:
    """One of Transformers' models from its config and its tensors, which leave the dictionary."""
    encoder, family = encoder_of(config, source), config["model_type"]
    if encoder.layers > len(tensors):  # a list of their names could take all memory
        raise UserError(f"{source}: its config's num_hidden_layers is {encoder.layers}; it has {len(tensors)} tensors")
    architecture = architecture_of(config, tensors, source)
    head = head_of(config, architecture, tensors, source)
    is_masked_lm = architecture in ("ElectraForMaskedLM", "BertForMaskedLM", "BertForPreTraining")
    tower = "generator" if is_masked_lm else "discriminator"
    entries = _entries(family, architecture, encoder, tower, _prefix(family, tensors), head)
    sizes = {key: getattr(encoder, field) for key, field in SIZES.items()} | {"type_vocab_size": 2}
    used = [name for entry in entries for name in entry.names]
    left_out = account(tensors, used, source)
    for name in left_out:
        del tensors[name]
    params = names.to_params(entries, tensors, sizes, source)
    return Model(
        params,
        encoder=None if is_masked_lm else encoder,
        generator=encoder if is_masked_lm else None,
        head=head,
        used=tuple(used),
        left_out=left_out,
    )


def pair(discriminator: Model, generator: Model, source: str) -> Model:
    """A pretraining tree of two towers. Their embeddings are the same; or the generator's are its own, of the same
    vocabulary and positions, and as wide as its hidden states."""
    if discriminator.encoder is None or discriminator.head or generator.generator is None:
        raise UserError(f"{source}: expected a discriminator (ElectraForPreTraining) and a generator (…ForMaskedLM)")
    for key in ("vocab_size", "max_position_embeddings"):
        here, there = (getattr(tower, SIZES[key]) for tower in (generator.generator, discriminator.encoder))
        if here != there:
            raise UserError(f"{source}: its config's {key} is {here}, the discriminator's {there}; expected the same")
    params: Params = {**discriminator.params, "generator": generator.params["generator"]}
    if not _same(discriminator.params["embeddings"], generator.params["embeddings"]):
        if generator.generator.embedding_width != generator.generator.width:
            raise UserError(
                f"{source}: its embeddings are not the discriminator's, nor as wide as its hidden states; "
                "electrax has a generator with the one or the other"
            )
        params["generator_embeddings"] = generator.params["embeddings"]
    return dataclasses.replace(
        discriminator,
        params=params,
        generator=generator.generator,
        used=(*discriminator.used, *(f"generator: {name}" for name in generator.used)),
        left_out={**discriminator.left_out, **{f"generator: {k}": v for k, v in generator.left_out.items()}},
    )


def _same(a: Params, b: Params) -> bool:
    return all(
        _same(a[key], b[key]) if isinstance(a[key], dict) else np.array_equal(a[key], b[key]) for key in a.keys() | b
    )


def _prefix(family: str, tensors: Mapping[str, np.ndarray]) -> str:
    """What stands before the encoder's names, which a bare encoder's may lack."""
    return f"{family}." if any(name.startswith(f"{family}.") for name in tensors) else ""


def _entries(
    family: str, architecture: str, encoder: EncoderConfig, tower: str, prefix: str, head: Head | None
) -> list[names.Entry]:
    width = "embedding_size" if family == "electra" else "hidden_size"
    entries = names.embeddings("embeddings", prefix, encoder, width)
    entries += names.encoder(f"{tower}/encoder", prefix, encoder)
    if head is not None:
        return entries + names.task_head(architecture, head.outputs)
    if architecture == "ElectraForPreTraining":
        return entries + names.replaced_token_head("discriminator/head")
    if tower == "generator":
        return entries + names.masked_lm_head("generator/head", family, encoder, width)
    return entries


# -- writing -----------------------------------------------------------------------------------------------------------


def write(path: pathlib.Path, model: Model, tokenizer: Tokenizer, trained_length: int = 0) -> dict[str, list[str]]:
    """The model as directories that Transformers opens; both towers of a pretraining go into the folders
    `discriminator` and `generator`. Returns the tensors' names by folder. `trained_length` is how many tokens the rows
    it was trained on have (0: one a position).

    `path` must be new or empty: everything is written beside it first. Raises UserError for what Transformers' ELECTRA
    does not have.
    """
    written = {}
    for folder, part, architecture in _parts(model):
        encoder = part.encoder or part.generator
        assert encoder is not None
        if encoder.body != "electra":
            raise UserError(f'the body "{encoder.body}" has no counterpart in Transformers; expected "electra"')
        tower, family = "discriminator" if part.encoder else "generator", family_of(architecture)
        if family == "bert" and encoder.embedding_width != encoder.width:
            raise UserError(
                f"a pooled head is BERT's, whose embeddings are as wide as its hidden states ({encoder.width}), not "
                f"{encoder.embedding_width}; a model fine-tuned with --head.style dense has a counterpart"
            )
        entries = _entries(family, architecture, encoder, tower, f"{family}.", part.head)
        tensors = names.from_params(entries, part.params)
        directory = path / folder
        directory.mkdir(parents=True, exist_ok=True)
        write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
        config = config_of(encoder, architecture, part.head, tokenizer)
        write_atomically(directory / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_tokenizer(directory, tokenizer, trained_length or encoder.max_length)
        written[folder] = sorted(tensors)
    return written


def _parts(model: Model) -> list[tuple[str, Model, str]]:
    """(folder, one tower, class) of each of Transformers' models that a model becomes."""
    if model.head:
        return [("", model, _class_of(model.head))]
    parts = []
    if model.encoder:
        is_whole = "head" in model.params["discriminator"]
        only = {name: model.params[name] for name in ("embeddings", "discriminator")}
        parts.append((PAIR[0], Model(only, model.encoder), "ElectraForPreTraining" if is_whole else "ElectraModel"))
    if model.generator:
        own = model.params.get("generator_embeddings", model.params["embeddings"])
        only = {"embeddings": own, "generator": model.params["generator"]}
        parts.append((PAIR[1], Model(only, None, model.generator), "ElectraForMaskedLM"))
    return parts if len(parts) == 2 else [("", *parts[0][1:])]


def _class_of(head: Head) -> str:
    if head.style in ("linear", "joint") and head.task != "tag":
        needed = "head.style dense" if head.task == "classify" else "head.spans plain"
        raise UserError(
            f"a {head.style} head of the task {head.task} has no counterpart in Transformers; "
            f"a model fine-tuned with --{needed} has one"
        )
    for name, (task, style) in HEADS.items():
        if (task, style) == (head.task, head.style) and name.endswith("MultipleChoice") == (head.kind == "choice"):
            return name
    raise ValueError(head)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def read_tokenizer(path: pathlib.Path, lowercase: bool | None = None, longest_word: int = LONGEST_WORD) -> Tokenizer:
    """A tokenizer's file, or that of a directory. Text for a vocab.txt is lowercased as `lowercase` says, else as
    tokenizer_config.json beside it, else where the vocabulary has no capitals. Raises UserError where `lowercase` has
    no use, since every other file says it itself."""
    path = _main_folder(path)
    vocabulary = path / VOCABULARY_FILE if path.is_dir() else path
    is_plain = vocabulary.suffix == ".txt" and vocabulary.is_file()
    if lowercase is None and (not is_plain or (path / HUGGING_FACE_FILE).is_file()):
        return Tokenizer.load(path)
    if not is_plain:
        raise UserError(f"lowercase is for a {VOCABULARY_FILE}; {path} has none")
    settings = _settings(vocabulary.parent)
    said = {key: settings.get(key) for key in ("do_lower_case", "strip_accents")}
    for key, value in said.items():
        if not isinstance(value, bool | None):
            file = vocabulary.with_name(SETTINGS_FILE)
            raise UserError(f"{file}: {key} is {reprlib.repr(value)}; expected true or false")
    lowercase = said["do_lower_case"] if lowercase is None else lowercase
    return Tokenizer.load(vocabulary, lowercase, said["strip_accents"], longest_word)


def row_length(path: pathlib.Path, positions: int) -> int:
    """How many tokens a row has, where tokenizer_config.json says that they are fewer than the positions."""
    length = _settings(_main_folder(path)).get("model_max_length")
    return length if type(length) is int and SHORTEST_ROW <= length <= positions else positions


def _main_folder(path: pathlib.Path) -> pathlib.Path:
    return path / PAIR[0] if not (path / CONFIG_FILE).is_file() and is_directory(path) else path


def _settings(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path / SETTINGS_FILE) if (path / SETTINGS_FILE).is_file() else {}


def write_tokenizer(path: pathlib.Path, tokenizer: Tokenizer, max_length: int) -> None:
    """tokenizer.json with the template `[CLS] A [SEP] B [SEP]`, and tokenizer_config.json. Of a SentencePiece tokenizer
    only its own file, which no class of Transformers opens as it is."""
    file = tokenizer.save(path)
    if file.suffix != ".json":
        return
    pieces = dict(zip(tokenizer.special_ids, tokenizer.pieces(tokenizer.special_ids.values()), strict=True))
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("post_processor") is None:
        content["post_processor"] = _template(pieces, tokenizer.special_ids)
        write_atomically(file, json.dumps(content, ensure_ascii=False))
    settings = {f"{role}_token": piece for role, piece in pieces.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    write_atomically(path / SETTINGS_FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _template(pieces: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, Any]:
    def token(role: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": pieces[role], "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [token("cls", 0), text("A", 0), token("sep", 0)]
    special = {
        pieces[role]: {"id": pieces[role], "ids": [ids[role]], "tokens": [pieces[role]]} for role in ("cls", "sep")
    }
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), token("sep", 1)],
        "special_tokens": special,
    }
