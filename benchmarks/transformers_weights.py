"""Transformers' torch ELECTRA for classification, with the weights of an electrax one."""

import numpy as np
import torch
from transformers import ElectraConfig, ElectraForSequenceClassification

from electrax.models.encoder import EncoderConfig
from electrax.tasks.base import Params


def torch_classifier(encoder: EncoderConfig, params: Params) -> ElectraForSequenceClassification:
    """The model in evaluation mode. `params` is the tree of a ClassifyTask of the body "electra" whose head has the
    style "dense", Transformers' own."""
    config = ElectraConfig(
        vocab_size=encoder.vocab_size,
        embedding_size=encoder.embedding_width,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads,
        intermediate_size=encoder.feed_forward,
        max_position_embeddings=encoder.max_length,
        hidden_dropout_prob=encoder.dropout,
        attention_probs_dropout_prob=encoder.attention_dropout,
        num_labels=len(params["head"]["output"]["bias"]),
        attn_implementation="sdpa",
    )
    model = ElectraForSequenceClassification(config)
    state = {name: torch.tensor(np.array(leaf)) for name, leaf in _state(params, encoder).items()}
    model.load_state_dict(state)  # raises where a name or a shape is missing or unknown
    return model.eval()


def _state(params: Params, encoder: EncoderConfig) -> dict[str, np.ndarray]:
    """Arrays by Transformers' names. A Linear of torch has its kernel as [out, in]; qkv kernels are [D, H, 3, K] here,
    output kernels [H, K, D]."""
    state: dict[str, np.ndarray] = {}

    def dense(target: str, kernel, bias) -> None:
        bias = np.asarray(bias).reshape(-1)
        state[f"{target}.weight"], state[f"{target}.bias"] = np.asarray(kernel).reshape(-1, len(bias)).T, bias

    def norm(target: str, source: Params) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = source["scale"], source["bias"]

    tables, tower, head = params["embeddings"], params["discriminator"]["encoder"], params["head"]
    state["electra.embeddings.word_embeddings.weight"] = tables["word"][: encoder.vocab_size]
    state["electra.embeddings.position_embeddings.weight"] = tables["position"]
    state["electra.embeddings.token_type_embeddings.weight"] = tables["type"]
    norm("electra.embeddings.LayerNorm", tables["norm"])
    if "embeddings_project" in tower:
        dense("electra.embeddings_project", **tower["embeddings_project"])
    for i in range(encoder.layers):
        target, layer = f"electra.encoder.layer.{i}", tower[f"layer_{i}"]
        qkv, output = layer["attention"]["qkv"], layer["attention"]["output"]
        for j, part in enumerate(("query", "key", "value")):
            dense(f"{target}.attention.self.{part}", qkv["kernel"][:, :, j], qkv["bias"][:, j])
        dense(f"{target}.attention.output.dense", output["kernel"], output["bias"])
        norm(f"{target}.attention.output.LayerNorm", layer["attention_norm"])
        dense(f"{target}.intermediate.dense", **layer["up"])
        dense(f"{target}.output.dense", **layer["down"])
        norm(f"{target}.output.LayerNorm", layer["output_norm"])
    dense("classifier.dense", **head["dense"])
    dense("classifier.out_proj", **head["output"])
    return state
