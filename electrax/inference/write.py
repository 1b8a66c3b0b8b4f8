"""Prompts in, continuations out; texts in, scores out: JSON lines in the same order."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

from electrax.config import UserError, check_seed
from electrax.data.examples import BadRow, TextExample
from electrax.inference import generation
from electrax.inference.generation import CausalModel
from electrax.inference.model import PretrainedModel
from electrax.inference.predict import ROWS, gathered, read_texts
from electrax.models.decoding import Sampling

Measure = Literal["perplexity", "pseudo_log_likelihood", "originality"]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continuations of prompts by a causal generator."""

    model: str  # work directory of a run, or a model of another format
    prompt: tuple[str, ...] = ()
    input: str = ""  # instead: a file with a prompt a line (.txt, or - for standard input)
    max_tokens: int = 64
    samples: int = 1  # of each prompt
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # of the likeliest tokens so many only; 0: all
    top_p: float = 1.0  # of the likeliest tokens the fewest whose probabilities sum to it
    repetition_penalty: float = 1.0  # divides the logits of tokens that were there
    stop: tuple[str, ...] = ()  # a continuation ends before any of these
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        if bool(self.prompt) == bool(self.input):
            raise UserError("generate: expected either --prompt TEXT or --input FILE")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError(
                "generate: expected temperature and top_k not below 0, top_p above 0 and at most 1, and "
                "repetition_penalty above 0"
            )


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How likely, or how original, texts are to a pretrained model."""

    model: str  # work directory of a run, or a model of another format
    input: str  # a file with a text a line (.txt, or - for standard input)
    # a causal generator's; a masked generator's, of each token masked out alone; the discriminator's
    by: Measure = "perplexity"
    stride: int = 0  # tokens between the windows of a text longer than the model (perplexity); 0: half a window
    whole: bool = False  # the file is one text (perplexity)
    batch_tokens: int = 0  # of a large batch; fewer need less memory; 0: chosen for the device

    def __post_init__(self):
        if self.by != "perplexity" and (self.whole or self.stride):
            raise UserError(f"score: stride and whole are for perplexity, not for {self.by}")


def generate_lines(model: PretrainedModel, config: GenerateConfig) -> Iterator[str]:
    """One JSON object a continuation. A prompt that cannot be used gives {"error": …}, and the rest go on."""
    sampling = Sampling(config.repetition_penalty, config.temperature, config.top_k, config.top_p)
    causal = model.causal("generate")
    if config.top_k > causal.config.vocab_size:
        raise UserError(f"generate: top_k {config.top_k} is more than the {causal.config.vocab_size} tokens there are")
    given = (TextExample(f"prompt {n}", (text,), None) for n, text in enumerate(config.prompt))
    rows = (_fitting(model, row) for row in (given if config.prompt else read_texts(config.input)))
    number = 0
    for some in gathered(rows, generation.ROWS, config.input):
        prompts = [(number + n, row.texts[0]) for n, row in enumerate(some) if not isinstance(row, BadRow)]
        options = (config.max_tokens, sampling, config.samples, config.stop, config.seed)
        found = iter(causal.generate([text for _, text in prompts], *options, numbers=[n for n, _ in prompts]))
        for row in some:
            if isinstance(row, BadRow):
                yield _error(row)
                continue
            for continuation in next(found):
                yield json.dumps({"prompt": row.texts[0], **continuation._asdict()}, ensure_ascii=False)
        number += len(some)


def score_lines(model: PretrainedModel, config: ScoreConfig) -> Iterator[str]:
    """One JSON object a text, or one of the whole file. A text that cannot be read or is too long gives
    {"error": …}, and the rest go on."""
    if config.whole:
        yield json.dumps(_likelihood(model.causal("score"), _whole(config.input), config.stride))
        return
    rows = read_texts(config.input)
    if config.by != "perplexity":  # which reads a long text in windows
        rows = (_fitting(model, row) for row in rows)
    for some in gathered(rows, ROWS, config.input):
        found = iter(_scores(model, config, [row.texts[0] for row in some if not isinstance(row, BadRow)]))
        for row in some:
            yield _error(row) if isinstance(row, BadRow) else json.dumps(next(found), ensure_ascii=False)


def _whole(source: str) -> str:
    """The file as one text; empty lines are lines."""
    lines = []
    for row in read_texts(source):
        if isinstance(row, BadRow) and row.kind != "empty text":
            raise UserError(f"{row.where}: {row.message}")
        lines.append("" if isinstance(row, BadRow) else row.texts[0])
    return "\n".join(lines)


def _fitting(model: PretrainedModel, row: TextExample | BadRow) -> TextExample | BadRow:
    """The row, or in the place of a text that is too long for the model what is wrong with it."""
    most = model.max_length - 2
    if isinstance(row, BadRow) or (tokens := len(model.tokenizer.encode_batch([row.texts[0]])[0])) <= most:
        return row
    return BadRow(row.where, "long text", f"expected at most {most} tokens, found {tokens}")


def _error(row: BadRow) -> str:
    return json.dumps({"error": f"{row.where}: {row.message}"}, ensure_ascii=False)


def _scores(model: PretrainedModel, config: ScoreConfig, texts: list[str]) -> list[dict[str, Any]]:
    if config.by == "perplexity":
        causal = model.causal("score")
        return [_likelihood(causal, text, config.stride) for text in texts]
    return [{config.by: score} for score in getattr(model, config.by)(texts).tolist()]


def _likelihood(model: CausalModel, text: str, stride: int) -> dict[str, Any]:
    found = model.likelihood(text, stride)
    bits = -found.log_probability / math.log(2) / max(1, len(text.encode()))
    return {"perplexity": found.perplexity, "bits_per_byte": bits, **found._asdict()}
