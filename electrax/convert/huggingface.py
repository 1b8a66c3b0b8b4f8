"""Hugging Face directories: Transformers' ELECTRA and BERT, read and written."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from electrax.config import UserError
from electrax.convert import names
from electrax.convert.model import Head, Model, account
from electrax.convert.weights import read_weights, write_safetensors
from electrax.data.shards import write_atomically
from electrax.data.tokenizer import Tokenizer
from electrax.models.encoder import EncoderConfig
from electrax.tasks.base import Params

CONFIG_FILE = "config.json"
PAIR = ("discriminator", "generator")  # folders of a directory that holds both
FAMILIES = ("electra", "bert")
SIZES = {  # keys of config.json that say the axes of tensors, and what they are called here
    "vocab_size": "vocab_size",
    "embedding_size": "embedding_width",
    "hidden_size": "width",
    "intermediate_size": "feed_forward",
    "max_position_embeddings": "max_length",
}
COUNTS = {"num_hidden_layers": "layers", "num_attention_heads": "heads"}
DROPOUTS = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"}
# what electrax's post-norm body has, whatever config.json may ask for
FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# the head of each fine-tuned model: task, style
HEADS = {
    "ElectraForSequenceClassification": ("classify", "dense"),
    "ElectraForMultipleChoice": ("classify", "dense"),
    "ElectraForTokenClassification": ("tag", "linear"),
    "ElectraForQuestionAnswering": ("answer", "plain"),
    "BertForSequenceClassification": ("classify", "pooled"),
    "BertForMultipleChoice": ("classify", "pooled"),
    "BertForTokenClassification": ("tag", "linear"),
    "BertForQuestionAnswering": ("answer", "plain"),
}
# a tensor by which a model shows itself, where config.json does not name its architecture
MARKS = {
    "discriminator_predictions.dense.weight": "ElectraForPreTraining",
    "generator_predictions.dense.weight": "ElectraForMaskedLM",
    "cls.predictions.transform.dense.weight": "BertForMaskedLM",
    "classifier.out_proj.weight": "ElectraForSequenceClassification",
    "sequence_summary.summary.weight": "ElectraForMultipleChoice",
    "qa_outputs.weight": "{family}ForQuestionAnswering",
}


def is_directory(path: pathlib.Path) -> bool:
    """Whether it is one model, or the folders of a discriminator and its generator."""
    return (path / CONFIG_FILE).is_file() or all((path / name / CONFIG_FILE).is_file() for name in PAIR)


def read(path: pathlib.Path, generator: pathlib.Path | None = None) -> Model:
    """The model of a directory. Two folders `discriminator` and `generator` in it, or a `generator` beside it, become
    one pretraining tree. Raises UserError where anything in it has no place in electrax."""
    if not (path / CONFIG_FILE).is_file() and is_directory(path):
        path, generator = (path / name for name in PAIR)
    model = read_tower(read_config(path), read_weights(path), str(path))
    if generator is None:
        return model
    return pair(model, read_tower(read_config(generator), read_weights(generator), str(generator)), str(generator))


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """config.json. Raises UserError where it is missing or damaged, or of another family of models."""
    path = path / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise UserError(f"{path}: a model of the family {family!r}; expected {' or '.join(FAMILIES)}")
    return config


def encoder_of(config: Mapping[str, Any], source: str) -> EncoderConfig:
    """The shape that config.json describes; BERT's embeddings are as wide as its hidden states.

    Raises UserError naming a key that is missing, or that asks for what the ELECTRA body does not have."""
    for key, value in FIXED.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{source}: its config's {key} is {config[key]!r}; electrax has {value!r} alone")
    config = {"embedding_size": config.get("hidden_size"), **config}
    fields = {}
    for key, field in {**SIZES, **COUNTS}.items():
        size = config.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{source}: its config's {key} is {size!r}; expected a number above 0")
        fields[field] = size
    for key, field in DROPOUTS.items():
        fields[field] = float(config.get(key, 0.1))
    try:
        return EncoderConfig(**fields)
    except ValueError as error:
        raise UserError(f"{source}: its config does not fit together: {error}") from None


def infer_config(family: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What config.json would say of tensors that come without one; heads are 64 wide, as in every published size."""
    tensor = {re.sub(r"^(electra|bert)\.", "", name): array for name, array in tensors.items()}
    layers = [int(found[1]) for name in tensor if (found := re.match(r"encoder\.layer\.(\d+)\.", name))]
    vocabulary, embedding = tensor["embeddings.word_embeddings.weight"].shape
    feed_forward, width = tensor["encoder.layer.0.intermediate.dense.weight"].shape
    return {
        "model_type": family,
        "vocab_size": vocabulary,
        "embedding_size": embedding,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "max_position_embeddings": len(tensor["embeddings.position_embeddings.weight"]),
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": max(1, width // 64),
    }


def read_tower(config: Mapping[str, Any], tensors: dict[str, np.ndarray], source: str) -> Model:
    """One of Transformers' models from its config and its tensors, which leave the dictionary."""
    encoder, family = encoder_of(config, source), config["model_type"]
    architecture = _architecture(config, tensors)
    head = _head(config, architecture, source)
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
    """A pretraining tree of two towers. Their embeddings are the same; or the generator's are its own and as wide as
    its hidden states."""
    if discriminator.encoder is None or discriminator.head or generator.generator is None:
        raise UserError(f"{source}: expected a discriminator (ElectraForPreTraining) and a generator (…ForMaskedLM)")
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


def _architecture(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """The name of the class; empty for a bare encoder."""
    known = {*HEADS, *MARKS.values(), "BertForPreTraining"}
    named = next((name for name in config.get("architectures") or () if name in known), None)
    family = config["model_type"].capitalize()
    return named or next((name.format(family=family) for mark, name in MARKS.items() if mark in tensors), "")


def _prefix(family: str, tensors: Mapping[str, np.ndarray]) -> str:
    """What stands before the encoder's names, which a bare encoder's may lack."""
    return f"{family}." if any(name.startswith(f"{family}.") for name in tensors) else ""


def _head(config: Mapping[str, Any], architecture: str, source: str) -> Head | None:
    if architecture not in HEADS:
        return None
    task, style = HEADS[architecture]
    if task == "answer":
        return Head(task, style=style)
    if architecture.endswith("MultipleChoice"):
        return Head(task, "choice", style)
    labels = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    try:
        classes = tuple(str(labels[key]) for key in sorted(labels, key=int))
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{source}: its config's id2label must map numbers to names") from None
    problem = config.get("problem_type")
    if task == "classify" and (problem == "regression" or len(classes) == 1):
        return Head(task, "number", style)
    kind = "labels" if problem == "multi_label_classification" else "classes"
    return Head(task, kind, style, classes)


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


def write(path: pathlib.Path, model: Model, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """The model as directories that Transformers opens; both towers of a pretraining go into the folders
    `discriminator` and `generator`. Returns the tensors' names by folder.

    `path` must be new or empty: everything is written beside it first. Raises UserError for what Transformers' ELECTRA
    does not have.
    """
    written = {}
    for folder, part, architecture in _parts(model):
        encoder = part.encoder or part.generator
        assert encoder is not None
        if encoder.modern:
            raise UserError('model.body "modern" has no counterpart in Transformers; expected the body "electra"')
        tower, family = "discriminator" if part.encoder else "generator", _family(architecture)
        entries = _entries(family, architecture, encoder, tower, f"{family}.", part.head)
        tensors = names.from_params(entries, part.params)
        directory = path / folder
        directory.mkdir(parents=True, exist_ok=True)
        write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
        config = config_of(encoder, architecture, part.head, tokenizer)
        write_atomically(directory / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_tokenizer(directory, tokenizer, encoder.max_length)
        written[folder] = sorted(tensors)
    return written


def _family(architecture: str) -> str:
    return "bert" if architecture.startswith("Bert") else "electra"


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


def config_of(encoder: EncoderConfig, architecture: str, head: Head | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json."""
    keys = {**SIZES, **COUNTS, **DROPOUTS}
    config: dict[str, Any] = {"architectures": [architecture], "model_type": _family(architecture)}
    config |= {key: getattr(encoder, field) for key, field in keys.items()}
    config |= {key: FIXED[key] for key in ("hidden_act", "layer_norm_eps", "type_vocab_size")}
    config["pad_token_id"] = tokenizer.pad_id
    if architecture.endswith("MultipleChoice"):
        config |= {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}
    if head and head.kind == "number":
        config |= {"problem_type": "regression", "id2label": {"0": "value"}, "label2id": {"value": 0}}
    elif head and head.classes:
        config["id2label"] = {str(i): name for i, name in enumerate(head.classes)}
        config["label2id"] = {name: i for i, name in enumerate(head.classes)}
        if head.kind == "labels":
            config["problem_type"] = "multi_label_classification"
        elif head.task == "classify":
            config["problem_type"] = "single_label_classification"
    return config


# -- tokenizers --------------------------------------------------------------------------------------------------------


def read_tokenizer(path: pathlib.Path) -> Tokenizer:
    """That of a directory; a vocab.txt alone is read as tokenizer_config.json says. Transformers takes a word of more
    than 100 characters for unknown."""
    if not (path / CONFIG_FILE).is_file() and is_directory(path):
        path = path / PAIR[0]
    if (path / "tokenizer.json").is_file() or not (path / "vocab.txt").is_file():
        return Tokenizer.load(path)
    settings_file = path / "tokenizer_config.json"
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{settings_file}: not JSON ({error})") from None
    lowercase = settings.get("do_lower_case", True)
    return Tokenizer.load(path / "vocab.txt", lowercase, settings.get("strip_accents"), longest_word=100)


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
    write_atomically(path / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


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


# -- names on the hub --------------------------------------------------------------------------------------------------


def from_hub(name: str) -> pathlib.Path | None:
    """The local folder of a model of the Hugging Face hub: from the cache at once, or downloaded. None where `name` is
    not of the form of such a name; UserError where it can be had neither way."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "vocab.txt", "*.model", "pytorch_model*.bin", "flax_model.msgpack"]
    try:
        return pathlib.Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=5))
    except Exception as error:  # httpx's, requests' or the library's own, by its version
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: no such file or directory, not in the cache of the Hugging Face hub, and it cannot be fetched: "
            f"{reason}"
        ) from None
