"""Prediction from texts to labels: electrax's Classifier against Transformers on PyTorch, in alternation.

    python -m benchmarks.predict [--size small] [--rows 512] [--glue ../shared/data/glue] [--rounds 9]

Both: the same texts of mixed lengths, vocabulary and weights, float32; tokenising, the model, softmax and labels. The
PyTorch side takes batches of 32 in the order of the input, each padded to its longest text. Texts: words of one token
each that make rows of 20 to 128 tokens, and the dev sets of SST-2 and MRPC, or without them the bundled sample's
sentences. Ratios are rates, electrax / PyTorch of the same round (above 1 is faster).
"""

import argparse
import lzma
import pathlib
import re
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks.finetune_step import CLASSES
from benchmarks.report import alternate, environment, percentiles, require_cpu, write
from electrax.data.corpus import sample_path
from electrax.data.encoded import encode_pairs
from electrax.data.examples import BadRows
from electrax.data.glue import GLUE, read_glue
from electrax.data.tokenizer import Tokenizer
from electrax.inference.classifier import Classifier
from electrax.models.sizes import ModelConfig, discriminator_shape
from electrax.tasks.base import Params
from electrax.tasks.classify import ClassifyTask

BATCH = 32  # rows of the PyTorch side
SHORTEST, LONGEST = 20, 128  # tokens of a made row, with [CLS] and [SEP]

Row = tuple[str, ...]  # one text or two
Predict = Callable[[Sequence[Row]], list[dict]]


# -- texts -------------------------------------------------------------------------------------------------------------


def sample_lines() -> list[str]:
    return [line for line in lzma.open(sample_path(), "rt", encoding="utf-8").read().split("\n") if line.strip()]


def get_tokenizer(vocabulary: str) -> Tokenizer:
    """That of a vocab.txt, or where it is not there one trained on the bundled sample."""
    if pathlib.Path(vocabulary).is_file():
        return Tokenizer.load(vocabulary)
    return Tokenizer.train("wordpiece", sample_lines(), 8000)


def made_rows(tokenizer: Tokenizer, count: int) -> list[Row]:
    """Rows whose numbers of tokens are uniform: words of the vocabulary, each of which is one token."""
    words = [piece for piece in tokenizer.pieces(range(tokenizer.vocab_size)) if re.fullmatch("[a-z]{2,}", piece)]
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST + 1, count)
    return [(" ".join(random.choice(words, length - 2)),) for length in lengths]


def sample_sentences(count: int) -> list[Row]:
    sentences = [s for line in sample_lines() for s in re.split(r"(?<=[.!?]) ", line)]
    picked = np.random.default_rng(0).permutation(len(sentences))[:count]
    return [(sentences[i],) for i in sorted(picked)]


def dev_rows(glue: str, task: str) -> list[Row]:
    bad = BadRows("error")
    examples = read_glue(glue, GLUE[task], "dev", bad)
    bad.close(glue)
    return [example.texts for example in examples]


def text_sets(tokenizer: Tokenizer, glue: str, count: int, limit: int) -> dict[str, list[Row]]:
    made = made_rows(tokenizer, count)
    if not pathlib.Path(glue).is_dir():
        return {"made": made, "sample": sample_sentences(limit or 2 * count)}
    return {"made": made} | {task: dev_rows(glue, task)[: limit or None] for task in ("sst2", "mrpc")}


# -- the two sides -----------------------------------------------------------------------------------------------------


def electrax_predict(task: ClassifyTask, params: Params, tokenizer: Tokenizer) -> Predict:
    classifier = Classifier(params, tokenizer, task, LONGEST)
    return lambda rows: classifier.predict(rows)


def transformers_tokenizer(tokenizer: Tokenizer):
    """Transformers' own of the same vocabulary."""
    from transformers import BertTokenizer

    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=LONGEST)


def torch_predict(task: ClassifyTask, params: Params, tokenizer: Tokenizer) -> Predict:
    """As one writes it with Transformers: its fast tokenizer with padding, the model without gradients."""
    import torch

    from benchmarks.transformers_weights import torch_classifier

    model, fast = torch_classifier(task.encoder, params), transformers_tokenizer(tokenizer)

    def predict(rows: Sequence[Row]) -> list[dict]:
        found: list[dict] = []
        for start in range(0, len(rows), BATCH):
            columns = [list(column) for column in zip(*rows[start : start + BATCH], strict=True)]
            inputs = fast(*columns, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                shares = model(**inputs).logits.softmax(-1)
            for row, best in zip(shares.tolist(), shares.argmax(-1).tolist(), strict=True):
                probabilities = dict(zip(task.classes, row, strict=True))
                found.append({"label": task.classes[best], "probability": row[best], "probabilities": probabilities})
        return found

    return predict


# -- measuring ---------------------------------------------------------------------------------------------------------


def disagreement(ours: list[dict], theirs: list[dict]) -> dict[str, float]:
    """Largest difference of the two sides' probabilities, and over which range these lie."""
    a, b = (np.array([[row["probabilities"][c] for c in CLASSES] for row in side]) for side in (ours, theirs))
    return {"largest_difference": float(np.abs(a - b).max()), "range": float(np.ptp(b[:, 0]))}


def measure(contestants: dict[str, Predict], rows: list[Row], tokens: int, rounds: int) -> dict:
    first, seconds = {}, {}
    for name, predict in contestants.items():
        start = time.perf_counter()
        first[name] = predict(rows)  # compiles
        seconds[name] = time.perf_counter() - start
    result = {"rows": len(rows), "tokens": tokens, "first_call_seconds": seconds, **disagreement(*first.values())}
    seconds = alternate({name: lambda p=predict: p(rows) for name, predict in contestants.items()}, rounds)
    ratios = [b / a for a, b in zip(seconds["electrax"], seconds["torch"], strict=True)]
    for name, values in seconds.items():
        result[name] = {"rows_per_second": percentiles([len(rows) / value for value in values])}
    return result | {"ratio": percentiles(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--rows", type=int, default=512, help="made rows")
    parser.add_argument("--limit", type=int, default=0, help="rows of each other set; 0: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--glue", default="../shared/data/glue", help="folder with GLUE's files")
    parser.add_argument("--vocabulary", default="../shared/data/vocab/vocab.txt", help="a vocab.txt, lower case")
    options = parser.parse_args()
    require_cpu()
    tokenizer = get_tokenizer(options.vocabulary)
    encoder = discriminator_shape(ModelConfig(size=options.size), tokenizer.vocab_size)
    task = ClassifyTask(encoder, tokenizer.pad_id, tokenizer.sep_id, classes=CLASSES, style="dense")
    params = jax.jit(task.init)(jax.random.key(0), {"ids": np.ones((1, 8), np.int32)})
    contestants = {
        "electrax": electrax_predict(task, params, tokenizer),
        "torch": torch_predict(task, params, tokenizer),
    }
    sets = {}
    for name, rows in text_sets(tokenizer, options.glue, options.rows, options.limit).items():
        lengths = [len(ids) for ids in encode_pairs(tokenizer, rows, LONGEST)[0]]
        sets[name] = row = measure(contestants, rows, sum(lengths), options.rounds)
        ours, theirs = (row[side]["rows_per_second"]["median"] for side in contestants)
        print(
            f"{name}: {len(rows)} rows of {min(lengths)} to {max(lengths)} tokens, {np.mean(lengths):.0f} on average: "
            f"electrax {ours:.1f} rows/s, torch {theirs:.1f}; ratio {row['ratio']['median']:.2f} "
            f"[{row['ratio']['p10']:.2f}, {row['ratio']['p90']:.2f}]; probabilities differ by at most "
            f"{row['largest_difference']:.1e} of a range of {row['range']:.1e}",
            flush=True,
        )
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {"size": options.size, "vocabulary": tokenizer.vocab_size, "target_ratio": 1.5, "sets": sets}
    write("predict.json", environment(versions) | results)


if __name__ == "__main__":
    main()
