"""Trained models from their work directories."""

import os

from electrax.data.tokenizer import Tokenizer
from electrax.experiment import finetune, pretrain
from electrax.experiment.config import FinetuneConfig, read_config
from electrax.experiment.run import load_params
from electrax.inference.classifier import Classifier
from electrax.inference.model import PretrainedModel
from electrax.inference.reader import Reader
from electrax.inference.tagger import Tagger


def load(workdir: str | os.PathLike) -> PretrainedModel | Classifier | Tagger | Reader:
    """A trained model from the work directory of a run: of a pretraining its newest whole checkpoint, of a fine-tuning
    the one its results were measured on (of several seeds the best)."""
    config = read_config(workdir)
    if isinstance(config, FinetuneConfig):
        return finetune.load(workdir)
    tokenizer = Tokenizer.load(workdir)
    task = pretrain.make_task(config, tokenizer.vocab_size, tokenizer.special_ids, None)
    params = load_params(workdir)[1]
    return PretrainedModel(
        {**params, "generator": task.generator_params(params)},
        tokenizer,
        None if task.two_tower else task.generator,
        task.discriminator if task.detects else None,
        config.data.max_length,  # later positions were never trained
        detects=not task.electric,  # whose logits lack the generator's part
    )
