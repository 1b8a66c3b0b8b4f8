"""Transformers' GPT-2, read as a causal LM alone."""

import dataclasses
import pathlib
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from electrax.config import UserError
from electrax.convert.config_json import CONFIG_FILE, expect, read_json, share_of, size_of
from electrax.convert.model import Model, account
from electrax.convert.names import Arrays, Entry, norm, plain, to_params
from electrax.convert.weights import read_weights
from electrax.data.tokenizer import Tokenizer
from electrax.models.encoder import EncoderConfig

FAMILY = "gpt2"
SIZES = {"vocab_size": "vocab_size", "n_embd": "width", "n_inner": "feed_forward", "n_positions": "max_length"}
COUNTS = {"n_layer": "layers", "n_head": "heads"}
DROPOUTS = {"resid_pdrop": "dropout", "attn_pdrop": "attention_dropout"}
# what the body has, whatever config.json may ask for
FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def is_directory(path: pathlib.Path) -> bool:
    return (path / CONFIG_FILE).is_file() and read_json(path / CONFIG_FILE).get("model_type") == FAMILY


def read(path: pathlib.Path, given: pathlib.Path) -> tuple[Model, Tokenizer]:
    """The model of a directory, and its tokenizer with the special tokens that GPT-2 lacks behind its own.

    Their embeddings are that of the token that ends a text, which also begins one: GPT-2's logits lie so far below zero
    that a row of zeros would be likelier than every token. Raises UserError where anything has no place in electrax."""
    source, config, tensors = str(path), read_json(path / CONFIG_FILE), read_weights(path)
    encoder = encoder_of(config, source)
    tokenizer, added = Tokenizer.load_completed(given)
    if tokenizer.vocab_size - added != encoder.vocab_size:
        tokens = tokenizer.vocab_size - added
        raise UserError(f"{path}: its tokenizer has {tokens} tokens, its word table {encoder.vocab_size} rows")
    end = config.get("eos_token_id")
    if type(end) is not int or not 0 <= end < encoder.vocab_size:
        raise UserError(f"{source}: its config's eos_token_id is {reprlib.repr(end)}; expected a token's number")
    if encoder.layers > len(tensors):  # a list of their names could take all memory
        raise UserError(f"{source}: its config's n_layer is {encoder.layers}; it has {len(tensors)} tensors")
    whole = dataclasses.replace(encoder, vocab_size=tokenizer.vocab_size)
    # Transformers' GPT2Model has no prefix
    prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    entries = [_word(whole, f"{prefix}wte.weight", end), *_others(whole, prefix)]
    used = [name for entry in entries for name in entry.names]
    left_out = account(tensors, used, source)
    params = to_params(entries, tensors, {key: getattr(encoder, field) for key, field in SIZES.items()}, source)
    return Model(params, encoder=None, generator=whole, used=tuple(used), left_out=left_out), tokenizer


def encoder_of(config: Mapping[str, Any], source: str) -> EncoderConfig:
    """The shape that config.json describes. Raises UserError naming a key that is missing, or that asks for what the
    body does not have."""
    expect({key: value for key, value in config.items() if value is not None}, FIXED, source)
    width = size_of(config, "n_embd", source)
    config = {**config, "n_inner": config.get("n_inner") or 4 * width}
    fields: dict[str, Any] = {field: size_of(config, key, source) for key, field in {**SIZES, **COUNTS}.items()}
    fields |= {field: share_of(config, key, source) for key, field in DROPOUTS.items()}
    try:
        return EncoderConfig(**fields, embedding_width=width, body="gpt2")
    except ValueError as error:
        raise UserError(f"{source}: its config does not fit together: {error}") from None


def _word(encoder: EncoderConfig, name: str, end: int) -> Entry:
    """The table, the row `end` again for each token that was added, and zeros behind."""

    def join(theirs: Arrays) -> np.ndarray:
        added = np.repeat(theirs[0][end : end + 1], encoder.vocab_size - len(theirs[0]), axis=0)
        return np.pad(np.concatenate([theirs[0], added]), [(0, encoder.padded_vocab_size - encoder.vocab_size), (0, 0)])

    return Entry("embeddings/word", (name,), ("vocab_size", "n_embd"), join)


def _others(encoder: EncoderConfig, prefix: str) -> Iterator[Entry]:
    """Kernels are [in, out] there, too; the attention's has queries, keys and values one after the other."""
    heads, width = encoder.heads, encoder.width

    def by_head(theirs: Arrays) -> np.ndarray:
        return np.moveaxis(theirs[0].reshape(*theirs[0].shape[:-1], 3, heads, -1), -3, -2)

    yield plain("embeddings/position", f"{prefix}wpe.weight", "n_positions", "n_embd")
    for i in range(encoder.layers):
        ours, theirs = f"generator/encoder/layer_{i}", f"{prefix}h.{i}"
        qkv, output = f"{ours}/attention/qkv", f"{ours}/attention/output"
        yield Entry(f"{qkv}/kernel", (f"{theirs}.attn.c_attn.weight",), ("n_embd", 3 * width), by_head)
        yield Entry(f"{qkv}/bias", (f"{theirs}.attn.c_attn.bias",), (3 * width,), by_head)
        kernel = (f"{theirs}.attn.c_proj.weight",)
        yield Entry(f"{output}/kernel", kernel, ("n_embd", "n_embd"), lambda t: t[0].reshape(heads, -1, width))
        yield plain(f"{output}/bias", f"{theirs}.attn.c_proj.bias", "n_embd")
        yield plain(f"{ours}/up/kernel", f"{theirs}.mlp.c_fc.weight", "n_embd", "n_inner")
        yield plain(f"{ours}/up/bias", f"{theirs}.mlp.c_fc.bias", "n_inner")
        yield plain(f"{ours}/down/kernel", f"{theirs}.mlp.c_proj.weight", "n_inner", "n_embd")
        yield plain(f"{ours}/down/bias", f"{theirs}.mlp.c_proj.bias", "n_embd")
        yield from norm(f"{ours}/attention_norm", f"{theirs}.ln_1", "n_embd")
        yield from norm(f"{ours}/output_norm", f"{theirs}.ln_2", "n_embd")
    yield from norm("generator/encoder/final_norm", f"{prefix}ln_f", "n_embd")
