"""config.json of Transformers' ELECTRA and BERT: what it says of a model, checked; and written."""

import pathlib
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from electrax.config import UserError
from electrax.convert import names
from electrax.convert.model import Head
from electrax.convert.safetensors import parse_json
from electrax.data.outside import read_bytes
from electrax.data.tokenizer import Tokenizer
from electrax.models.encoder import EncoderConfig

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
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
# what stands between the encoder and the output of ElectraForMultipleChoice
SUMMARY = {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file. Raises UserError where it is missing or damaged."""
    return parse_json(path, read_bytes(path))


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """config.json of a directory. Raises UserError where it is missing or damaged, or of another family of models."""
    path = path / CONFIG_FILE
    config = read_json(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        expected = f"{' or '.join(FAMILIES)}, or gpt2 alone"
        raise UserError(f"{path}: a model of the family {reprlib.repr(family)}; expected {expected}")
    return config


def encoder_of(config: Mapping[str, Any], source: str) -> EncoderConfig:
    """The shape that config.json describes; BERT's embeddings are as wide as its hidden states.

    Raises UserError naming a key that is missing, or that asks for what the ELECTRA body does not have."""
    expect({key: value for key, value in config.items() if value is not None}, FIXED, source)
    config = {"embedding_size": config.get("hidden_size"), **config}
    fields: dict[str, Any] = {field: size_of(config, key, source) for key, field in {**SIZES, **COUNTS}.items()}
    fields |= {field: share_of(config, key, source) for key, field in DROPOUTS.items()}
    try:
        return EncoderConfig(**fields)
    except ValueError as error:
        raise UserError(f"{source}: its config does not fit together: {error}") from None


def size_of(config: Mapping[str, Any], key: str, source: str) -> int:
    size = config.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{source}: its config's {key} is {reprlib.repr(size)}; expected a number above 0")
    return size


def share_of(config: Mapping[str, Any], key: str, source: str) -> float:
    """What is dropped; a tenth where config.json does not say it."""
    share = config.get(key, 0.1)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share < 1:
        raise UserError(f"{source}: its config's {key} is {reprlib.repr(share)}; expected a number from 0 to below 1")
    return float(share)


def expect(config: Mapping[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Raises UserError naming a key that says something else than what is wanted."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            found = reprlib.repr(config[key])
            raise UserError(f"{source}: its config's {key} is {found}; electrax has {value!r} alone")


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


def architecture_of(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str) -> str:
    """The name of the class; empty for a bare encoder."""
    known = {*HEADS, *MARKS.values(), "BertForPreTraining"}
    said = config.get("architectures") or []
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        raise UserError(f"{source}: its config's architectures is {reprlib.repr(said)}; expected a list of names")
    named = next((name for name in said if name in known), None)
    family = config["model_type"].capitalize()
    return named or next((name.format(family=family) for mark, name in MARKS.items() if mark in tensors), "")


def family_of(architecture: str) -> str:
    return "bert" if architecture.startswith("Bert") else "electra"


def head_of(
    config: Mapping[str, Any], architecture: str, tensors: Mapping[str, np.ndarray], source: str
) -> Head | None:
    """The head of a fine-tuned model. Raises UserError naming a key that says something else than its tensors, or that
    asks for what electrax does not have."""
    if architecture not in HEADS:
        return None
    task, style = HEADS[architecture]
    if task == "answer":
        return Head(task, style=style)
    if architecture.endswith("MultipleChoice"):
        if style == "dense":
            expect(config, SUMMARY, source)
        return Head(task, "choice", style)
    problem = config.get("problem_type")
    if problem not in (None, *PROBLEMS):
        expected = " or ".join(PROBLEMS)
        raise UserError(f"{source}: its config's problem_type is {reprlib.repr(problem)}; expected {expected}")
    if task == "classify" and problem == "regression":
        return Head(task, "number", style)
    bias = tensors.get(names.task_head(architecture, 0)[-1].names[0])
    classes = _classes(config, 0 if bias is None else bias.size, source)
    if task == "classify" and problem is None and len(classes) == 1:
        return Head(task, "number", style)
    kind = "labels" if task == "classify" and problem == "multi_label_classification" else "classes"
    return Head(task, kind, style, classes)


def _classes(config: Mapping[str, Any], outputs: int, source: str) -> tuple[str, ...]:
    """Their names; of an output layer that none are said of, those that Transformers gives."""
    labels = config.get("id2label")
    if labels is None or labels == {}:
        count = config.get("num_labels")
        if count not in (None, outputs):
            found = reprlib.repr(count)
            raise UserError(f"{source}: its config's num_labels is {found}; its output layer has {outputs} rows")
        return tuple(f"LABEL_{i}" for i in range(outputs))
    said = [labels.get(str(i)) for i in range(len(labels))] if isinstance(labels, dict) else [None]
    if not all(isinstance(name, str | int | float) for name in said):
        raise UserError(f"{source}: its config's id2label must map the numbers from 0 on to names")
    classes = tuple(map(str, said))
    name, times = Counter(classes).most_common(1)[0]
    if times > 1:
        raise UserError(f"{source}: its config's id2label gives the name {name!r} to {times} classes")
    return classes


# -- writing -----------------------------------------------------------------------------------------------------------


def config_of(encoder: EncoderConfig, architecture: str, head: Head | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json."""
    keys = {**SIZES, **COUNTS, **DROPOUTS}
    config: dict[str, Any] = {"architectures": [architecture], "model_type": family_of(architecture)}
    config |= {key: getattr(encoder, field) for key, field in keys.items()}
    config |= {key: FIXED[key] for key in ("hidden_act", "layer_norm_eps", "type_vocab_size")}
    config["pad_token_id"] = tokenizer.pad_id
    if architecture.endswith("MultipleChoice"):
        config |= SUMMARY
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
