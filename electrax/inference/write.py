"""Prompts in, continuations out; texts in, scores out: JSON lines in the same order."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from electrax.config import UserError
from electrax.data.examples import BadRow, TextExample
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

    def __post_init__(self):
        if self.by != "perplexity" and (self.whole or self.stride):
            raise UserError(f"score: stride and whole are for perplexity, not for {self.by}")


def generate_lines(model: PretrainedModel, config: GenerateConfig) -> Iterator[str]:
    """One JSON object a continuation. A prompt that cannot be used gives {"error": …}, and the rest go on."""
    sampling = Sampling(config.repetition_penalty, config.temperature, config.top_k, config.top_p)
    causal = model.causal("generate")
    if config.top_k > causal.config.vocab_size:
        raise UserError(f"generate: top_k {config.top_k} is more than the {causal.config.vocab_size} tokens there are")
    if config.prompt:
        found = causal.generate(config.prompt, config.max_tokens, sampling, config.samples, config.stop, config.seed)
        rows: Iterator[Any] = zip(config.prompt, found, strict=True)
    else:
        rows = _continued(causal, config, sampling)
    for prompt, continuations in rows:
        if isinstance(prompt, BadRow):
            yield json.dumps({"error": f"{prompt.where}: {prompt.message}"}, ensure_ascii=False)
        for continuation in continuations:
            yield json.dumps({"prompt": prompt, **continuation._asdict()}, ensure_ascii=False)


def _continued(causal: CausalModel, config: GenerateConfig, sampling: Sampling) -> Iterator[tuple[Any, Sequence[Any]]]:
    for row in read_texts(config.input):
        if isinstance(row, BadRow):
            yield row, ()
            continue
        try:
            options = (config.max_tokens, sampling, config.samples, config.stop, config.seed)
            yield row.texts[0], causal.generate([row.texts[0]], *options)[0]
        except UserError as error:
            yield BadRow(row.where, "prompt", str(error)), ()


def score_lines(model: PretrainedModel, config: ScoreConfig) -> Iterator[str]:
    """One JSON object a text, or one of the whole file. A text that cannot be read or is too long gives
    {"error": …}, and the rest go on."""
    if config.whole:
        yield json.dumps(_likelihood(model.causal("score"), _whole(config.input), config.stride))
        return
    rows = (row if isinstance(row, BadRow) else _fitting(model, config, row) for row in read_texts(config.input))
    for some in gathered(rows, ROWS, config.input):
        found = iter(_scores(model, config, [row.texts[0] for row in some if not isinstance(row, BadRow)]))
        for row in some:
            scored = {"error": f"{row.where}: {row.message}"} if isinstance(row, BadRow) else next(found)
            yield json.dumps(scored, ensure_ascii=False)


def _whole(source: str) -> str:
    """The file as one text; empty lines are lines."""
    lines = []
    for row in read_texts(source):
        if isinstance(row, BadRow) and row.kind != "empty text":
            raise UserError(f"{row.where}: {row.message}")
        lines.append("" if isinstance(row, BadRow) else row.texts[0])
    return "\n".join(lines)


def _fitting(model: PretrainedModel, config: ScoreConfig, row: TextExample) -> TextExample | BadRow:
    tokens = len(model.tokenizer.encode_batch([row.texts[0]])[0])
    if config.by == "perplexity" or tokens <= model.max_length - 2:
        return row
    return BadRow(row.where, "long text", f"expected at most {model.max_length - 2} tokens, found {tokens}")


def _scores(model: PretrainedModel, config: ScoreConfig, texts: list[str]) -> list[dict[str, Any]]:
    if config.by == "perplexity":
        causal = model.causal("score")
        return [_likelihood(causal, text, config.stride) for text in texts]
    return [{config.by: score} for score in getattr(model, config.by)(texts).tolist()]


def _likelihood(model: CausalModel, text: str, stride: int) -> dict[str, Any]:
    found = model.likelihood(text, stride)
    bits = -found.log_probability / math.log(2) / max(1, len(text.encode()))
    return {"perplexity": found.perplexity, "bits_per_byte": bits, **found._asdict()}
