"""What a run that rewrites texts has beside the other fine-tunings: a decoder, and perhaps a second vocabulary."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from electrax.config import AnyPath, UserError
from electrax.data.encoded import encode_pairs
from electrax.data.examples import BadRows, TextExample
from electrax.data.parallel import PairBatches
from electrax.data.tokenizer import Tokenizer, is_kind
from electrax.experiment.config import DecoderConfig, FinetuneConfig
from electrax.experiment.examples import ExamplesConfig, references, targets_of
from electrax.experiment.rows import TaskRows, notes_of
from electrax.experiment.run import holds_run
from electrax.experiment.start import taken_embeddings
from electrax.models.sizes import discriminator_shape
from electrax.storage import make_folder, path_of
from electrax.tasks.base import Params
from electrax.training.processes import agreed

TARGET_FOLDER = "target"  # in the work directory: the tokenizer of a target with a vocabulary of its own


def target_tokenizer(config: FinetuneConfig, tokenizer: Tokenizer, examples: Sequence[TextExample]) -> Tokenizer:
    """That of a run's targets: the source's; or, unless the run is there already, the one that `decoder.tokenizer`
    names, or of a kind a new one for the training targets."""
    wanted, folder = config.decoder.tokenizer, path_of(config.workdir) / TARGET_FOLDER
    if not wanted:
        return tokenizer
    if holds_run(config.workdir):
        return Tokenizer.load(folder)
    if not is_kind(wanted, "decoder.tokenizer"):
        return Tokenizer.load(wanted, config.data.lowercase)

    def train() -> Tokenizer:
        return Tokenizer.train(wanted, targets_of(examples), config.decoder.vocab_size, config.data.lowercase)

    if jax.process_count() == 1:
        return train()
    agreed(lambda: str(_save(train(), folder)))  # trained in one process: training it twice may give two vocabularies
    return Tokenizer.load(folder)


def kept_target(workdir: AnyPath, config: FinetuneConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The one that is kept with a trained model, or the source's, where both are one."""
    return Tokenizer.load(workdir / TARGET_FOLDER) if config.decoder.tokenizer else tokenizer


def keep_target(config: FinetuneConfig, target: Tokenizer | None) -> None:
    """Saves a target's own tokenizer in the work directory."""
    if target is not None and config.decoder.tokenizer:
        _save(target, path_of(config.workdir) / TARGET_FOLDER)


def _save(tokenizer: Tokenizer, folder: AnyPath) -> AnyPath:
    make_folder(folder)
    return tokenizer.save(folder)


def rewrite_rows(
    config: ExamplesConfig,
    decoder: DecoderConfig,
    tokenizer: Tokenizer,
    target: Tokenizer,
    train: list[TextExample],
    dev: list[TextExample],
    bad: BadRows,
    batch_size: int,
) -> TaskRows:
    """Pairs of sources and targets, as RewriteTask wants them: one of every target of a training text, and of a dev
    text its first, with all of them as references. Raises UserError for all bad rows at once."""
    bad.close(config.path)
    pairs = {
        "train": [(e.texts[0], text) for e in train for text in references(e)],
        "dev": [(e.texts[0], references(e)[0]) for e in dev],
    }
    batches, cut = {}, {}
    for name, texts in pairs.items():
        if not texts:
            batches[name] = None
            continue
        sources, source_cut = encode_pairs(tokenizer, [(source,) for source, _ in texts], config.max_length)
        targets, target_cut = encode_pairs(target, [(text,) for _, text in texts], decoder.max_length + 1)
        cut[name] = int(source_cut.sum())
        cut[f"{name} target"] = int(target_cut.sum())
        pads = tokenizer.pad_id, target.pad_id
        batches[name] = PairBatches.of(sources, targets, batch_size, pads, config.shapes, config.length_multiple or 1)
    ids = {"vocab_size": target.vocab_size, "cls": target.cls_id, "sep": target.sep_id, "pad": target.pad_id}
    ids |= {"tokenizer": target.sha256, "layers": decoder.layers, "weights": decoder.weights}
    head = {"classes": [], "metric": "bleu", "target": ids}
    notes = notes_of(bad, cut, config.max_length, decoder.max_length + 1)
    return TaskRows(**batches, head=head, notes=notes, references=[references(e) for e in dev], target=target)


def decoder_fields(config: FinetuneConfig, vocab_size: int, head: dict[str, Any]) -> dict[str, Any]:
    """What RewriteTask has beside the fields of every fine-tuning task."""
    d, target = config.decoder, head["target"]
    shape = discriminator_shape(config.model, vocab_size)
    if d.weights == "shared" and d.layers not in (0, shape.layers):
        raise UserError(f'decoder.weights "shared" needs as many layers as the encoder has, {shape.layers}, or 0')
    if d.max_length > shape.max_length:
        raise UserError(f"decoder.max_length {d.max_length} is more than the model's {shape.max_length}")
    decoder = dataclasses.replace(shape, vocab_size=target["vocab_size"], layers=d.layers or shape.layers)
    if d.beams > target["vocab_size"]:
        raise UserError(f"decoder.beams {d.beams} is more than the {target['vocab_size']} tokens of the vocabulary")
    return {
        "decoder": decoder,
        "cls_id": target["cls"],
        "end_id": target["sep"],
        "target_pad_id": target["pad"],
        "own_vocabulary": bool(d.tokenizer),
        "weights": d.weights,
        "label_smoothing": d.label_smoothing,
        "most": d.max_length,
        "beams": d.beams,
        "length_penalty": d.length_penalty,
        "coverage_penalty": d.coverage_penalty,
    }


def started_decoder(
    config: DecoderConfig, encoder: Params, embeddings: Params, tokens: tuple[list[int], list[int]], drawn: Params
) -> Params:
    """The parts of the drawn weights that the pretrained ones replace: the decoder's layers by the encoder's, evenly
    chosen where they are fewer, with drawn attention to the source; and the rows of the tokens that a vocabulary of
    the target's own has in common (`tokens`: their ids there and here)."""
    taken: Params = {}
    if config.weights == "encoder":
        taken["decoder"] = dict(drawn["decoder"])
        there, here = (sum(name.startswith("layer_") for name in part) for part in (encoder, drawn["decoder"]))
        for name, part in drawn["decoder"].items():
            if name.startswith("layer_"):
                number = int(name.removeprefix("layer_"))
                name_there = f"layer_{number * there // here}"
            else:
                name_there = name
            copies = {key: jax.tree.map(jnp.copy, leaf) for key, leaf in encoder[name_there].items() if key in part}
            taken["decoder"][name] = {**part, **copies}  # a buffer that is there twice could not be given away
    if "target_embeddings" in drawn:
        taken["target_embeddings"] = taken_embeddings(embeddings, drawn["target_embeddings"], *tokens)
    return taken
