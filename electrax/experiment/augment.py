"""New examples made of old ones: a generator rewrites their texts, and a filter keeps the best."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from electrax.config import UserError, check_seed
from electrax.data.examples import TextExample
from electrax.data.glue import GLUE
from electrax.experiment.examples import ExamplesConfig, read_examples
from electrax.experiment.saved import load
from electrax.inference.classifier import Classifier
from electrax.inference.model import PretrainedModel
from electrax.inference.predict import LINES, read_texts
from electrax.models.decoding import Sampling
from electrax.storage import on_this_machine, write_atomically

ORIGIN, SOURCE = "origin", "source"  # columns that say how a row was made, and of which one
ORIGIN_SUFFIX = ".origin.jsonl"  # the same beside a text file, a line for each text


# keys of [data] that say which rows these are
READ = (
    "format",
    "glue",
    "tfds_dir",
    "train",
    "dev",
    "holdout",
    "limit",
    "on_bad_row",
    "text",
    "label",
    "label_separator",
)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Labelled rows become a table with the columns of the texts, the label and where each comes from; a .txt file
    with a text a line becomes one to pretrain on, with what each text comes from beside it."""

    dataset: str  # what data.path is in fine-tuning, or a .txt file of texts without labels
    out: str = ""  # .jsonl, or for a .txt file .txt
    generator: str = ""  # a pretrained model
    how: Literal["replace", "continue"] = "replace"  # tokens masked out and sampled anew; the second half written anew
    per_row: int = 1  # new texts made of each
    share: float = 0.15  # of a text's tokens that are replaced
    temperature: float = 1.0  # of the generator's samples
    teacher: str = ""  # a fine-tuned classifier that labels the new rows; default: they keep the old label
    min_confidence: float = 0.0  # of the teacher's label
    keep: float = 1.0  # share of the new texts that is kept, those that look most original
    discriminator: str = ""  # to which; default: the generator's own model
    seed: int = 0
    # of the labels, as in fine-tuning, which holds the same rows out: head.kind, or text for a translation
    kind: Literal["classes", "labels", "number", "choice", "text"] = "classes"
    data: ExamplesConfig = ExamplesConfig()

    def __post_init__(self):
        check_seed(self.seed)
        if not self.out or not self.generator:
            raise UserError("augment: expected --out FILE and --generator MODEL")
        if self.is_labelled == self.out.endswith(".txt"):
            raise UserError(f"out {self.out}: expected a name ending in {'.jsonl' if self.is_labelled else '.txt'}")
        if self.is_labelled and not self.out.endswith(".jsonl"):
            raise UserError(f"out {self.out}: expected a name ending in .jsonl")
        named = next((f.name for f in dataclasses.fields(ExamplesConfig)
                      if f.name not in READ and getattr(self.data, f.name) != f.default), None)  # fmt: skip
        if named:
            raise UserError(f"augment: data.{named} has no effect here; known are {', '.join(READ)}")
        if self.data.format not in ("table", "glue"):
            raise UserError(f"augment: expected a table or data.format glue, not {self.data.format}")
        if self.per_row < 1 or not 0 < self.share < 1 or not 0 < self.keep <= 1 or self.temperature < 0:
            raise UserError(
                "augment: expected per_row of at least 1, share between 0 and 1, keep above 0 and at most 1, and "
                "temperature not below 0"
            )
        if not 0 <= self.min_confidence <= 1 or (self.min_confidence and not self.teacher):
            raise UserError("augment: min_confidence lies between 0 and 1 and is a teacher's")

    @property
    def is_labelled(self) -> bool:
        return not self.dataset.endswith(LINES)


class Made(NamedTuple):
    """A new example, the one it was made of, and what the filters know of it (NaN: nothing)."""

    texts: tuple[str, ...]
    label: str | tuple[str, ...] | None
    source: str
    confidence: float
    originality: float


def augment(config: AugmentConfig) -> dict[str, Any]:
    """Writes `config.out`, all or nothing; returns how many texts were made, and what became of them."""
    examples = _examples(config)
    model = _pretrained(config.generator, "generator")
    made = list(_new(config, model, examples))
    counts = {"rows": len(examples), "made": len(examples) * config.per_row, "changed": len(made)}
    if config.teacher:
        made = [each for each in _taught(config, made) if each.confidence >= config.min_confidence]
        counts["confident"] = len(made)
    if config.keep < 1:
        made = _most_original(config, model, made)
        counts["original"] = len(made)
    if not made:
        raise UserError(f"{config.dataset}: no new text is left to write")
    names = GLUE[config.data.glue].texts if config.data.format == "glue" else config.data.text
    _write(config, made, names)
    return counts


def _examples(config: AugmentConfig) -> list[TextExample]:
    if not config.is_labelled:
        rows = [row for row in read_texts(config.dataset) if isinstance(row, TextExample)]  # empty lines divide texts
        if not rows:
            raise UserError(f"{config.dataset}: expected a text a line, found none")
        return rows
    data = dataclasses.replace(config.data, path=config.dataset)
    rows, _, bad = read_examples(data, config.kind)
    bad.close(config.dataset)
    return rows


def _pretrained(source: str, key: str) -> PretrainedModel:
    model = load(source)
    if not isinstance(model, PretrainedModel):
        raise UserError(f"{key} {source}: expected a pretrained model")
    return model


def _new(config: AugmentConfig, model: PretrainedModel, examples: Sequence[TextExample]) -> Iterator[Made]:
    """What differs from what it was made of, no text twice."""
    known = {example.texts for example in examples}
    for number in range(config.per_row):
        seed = [config.seed, number]
        columns = [_rewritten(config, model, texts, [*seed, c]) for c, texts in enumerate(_columns(examples))]
        for example, texts in zip(examples, zip(*columns, strict=True), strict=True):
            if texts not in known and all(text.strip() for text in texts):
                known.add(texts)
                yield Made(texts, example.label, example.where, math.nan, math.nan)


def _columns(examples: Sequence[TextExample]) -> list[list[str]]:
    return [list(column) for column in zip(*(example.texts for example in examples), strict=True)]


def _rewritten(config: AugmentConfig, model: PretrainedModel, texts: list[str], seed: list[int]) -> list[str]:
    if config.how == "replace":
        return model.replace(texts, config.share, config.temperature, seed)
    tokenizer, room = model.tokenizer, model.max_length - 2
    rows = [ids[:room] for ids in tokenizer.encode_batch(texts)]
    prompts = [tokenizer.decode(ids[: (len(ids) + 1) // 2]) for ids in rows]
    most = max(len(ids) - len(ids) // 2 for ids in rows)
    number = int(np.random.SeedSequence(seed).generate_state(1)[0]) % 2**31
    found = model.generate(prompts, max_tokens=most, sampling=Sampling(temperature=config.temperature), seed=number)
    return [prompt + each[0].text for prompt, each in zip(prompts, found, strict=True)]


def _taught(config: AugmentConfig, made: list[Made]) -> Iterator[Made]:
    teacher = load(config.teacher)
    if not isinstance(teacher, Classifier) or teacher.task.kind != "classes":
        raise UserError(f"teacher {config.teacher}: expected the work directory of a classifier with classes")
    for each, found in zip(made, teacher.predict([each.texts for each in made]), strict=True):
        yield each._replace(label=found["label"], confidence=found["probability"])


def _most_original(config: AugmentConfig, model: PretrainedModel, made: list[Made]) -> list[Made]:
    """The share of them, in their old order, whose least original text looks most original."""
    judge = _pretrained(config.discriminator, "discriminator") if config.discriminator else model
    scores = np.stack([judge.originality(list(c), truncate=True) for c in zip(*(each.texts for each in made))]).min(0)  # noqa: B905
    best = np.sort(np.argsort(-scores, kind="stable")[: max(1, round(config.keep * len(made)))])
    return [made[place]._replace(originality=float(scores[place])) for place in best]


def _write(config: AugmentConfig, made: Sequence[Made], names: Sequence[str]) -> None:
    out = on_this_machine(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            ORIGIN: config.how,
            SOURCE: each.source,
            **{key: value for key, value in (("confidence", each.confidence), ("originality", each.originality))
               if not math.isnan(value)},
        }
        for each in made
    ]  # fmt: skip
    if config.is_labelled:
        label = "label" if config.data.format == "glue" else config.data.label
        rows = [
            {**dict(zip(names, each.texts, strict=True)), label: each.label, **about}
            for each, about in zip(made, rows, strict=True)
        ]
        write_atomically(out, _json_lines(rows))
        return
    write_atomically(pathlib.Path(os.fspath(out) + ORIGIN_SUFFIX), _json_lines(rows))
    # each is a document of its own
    write_atomically(out, "\n\n".join(each.texts[0].replace("\n", " ") for each in made) + "\n")


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
