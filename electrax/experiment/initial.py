"""What a fine-tuning starts from: a tokenizer, and the weights of another model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from electrax.config import UserError
from electrax.data.examples import Example
from electrax.data.tokenizer import Tokenizer, is_kind
from electrax.experiment.config import FinetuneConfig, read_config
from electrax.experiment.examples import targets_of, texts_of
from electrax.experiment.head import takes_head
from electrax.experiment.rewrite import started_decoder
from electrax.experiment.run import HEAD_FILE, holds_run, kept_tokenizer, load_params, trained
from electrax.experiment.start import same_shapes, shared_tokens, start_of, taken_embeddings
from electrax.tasks.base import Params
from electrax.training.processes import agreed


def get_tokenizer(config: FinetuneConfig, examples: Sequence[Example]) -> Tokenizer:
    """That of a run that is there already; else the one that `data.tokenizer` names, that of the pretrained weights, or
    for random weights a new one for the training texts."""
    data = config.data
    if holds_run(config.workdir):
        return kept_tokenizer(config.workdir)
    if not is_kind(data.tokenizer, "data.tokenizer"):
        return Tokenizer.load(data.tokenizer, data.lowercase)
    if config.init_from:
        return Tokenizer.load(start_of(config.init_from))
    if jax.process_count() == 1:
        return train_tokenizer(config, examples)
    # trained in one process: training it twice may give two vocabularies
    agreed(lambda: str(train_tokenizer(config, examples).save(config.workdir)))
    return Tokenizer.load(config.workdir)


def train_tokenizer(config: FinetuneConfig, examples: Sequence[Example]) -> Tokenizer:
    data = config.data
    texts = texts_of(examples)
    if config.task == "rewrite" and not config.decoder.tokenizer:
        texts += targets_of(examples)
    return Tokenizer.train(data.tokenizer, texts, data.vocab_size, data.lowercase)


def initial_params(
    config: FinetuneConfig,
    head: dict[str, Any],
    tokenizer: Tokenizer,
    drawn: Params,
    mesh: Mesh,
    target: Tokenizer | None = None,
) -> Params:
    """The drawn weights with those of `init_from` in their place: embeddings and encoder, and the head where that run
    had the same task and outputs; otherwise a decoder starts as the encoder. Of another vocabulary or more positions
    what is new stays as it is drawn."""
    start = start_of(config.init_from)
    is_finetuned = (start / HEAD_FILE).is_file()
    params = (trained if is_finetuned else load_params)(start, mesh)[1]
    tower = params["discriminator"] if "discriminator" in params else params["generator"]
    embeddings, known = params["embeddings"], Tokenizer.load(start)
    if known.sha256 != tokenizer.sha256 or not same_shapes(embeddings, drawn["embeddings"]):
        kept = jax.tree.map(np.asarray, embeddings)
        embeddings = taken_embeddings(kept, drawn["embeddings"], *shared_tokens(known, tokenizer))
    taken = {"embeddings": embeddings, "discriminator": {"encoder": tower["encoder"]}}
    if config.task == "rewrite" and target and not takes_head(start, head):
        source = jax.tree.map(np.asarray, params["embeddings"])
        taken |= started_decoder(config.decoder, tower["encoder"], source, shared_tokens(known, target), drawn)
    if config.head.template:
        if "discriminator" not in params or "head" not in tower:
            raise UserError(f"init_from {config.init_from}: has no discriminator's head, which head.template asks")
        taken["discriminator"] = tower
    elif takes_head(start, head):
        taken |= {name: params[name] for name in params if name not in taken}
    return {**drawn, **taken}


def start_notes(config: FinetuneConfig, head: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """What the weights that a run starts from do not make plain."""
    if not config.init_from:
        return []
    start, notes = start_of(config.init_from), []
    known = Tokenizer.load(start)
    if known.sha256 != tokenizer.sha256:
        fresh = tokenizer.vocab_size - len(shared_tokens(known, tokenizer)[1])
        notes.append(f"{fresh:,} of {tokenizer.vocab_size:,} tokens are new to the weights")
    if takes_head(start, head):
        notes.append(f"the head too is taken from {start}, whose outputs are the same")
    elif (start / HEAD_FILE).is_file() and not config.head.template:
        notes.append(f"the head of {start} is left out: its outputs are others")
    trained_length = read_config(start).data.max_length
    if config.data.max_length > trained_length:
        notes.append(f"the weights were trained on rows of {trained_length} tokens; later positions are new to them")
    return notes
