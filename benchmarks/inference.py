"""Encoding texts: electrax's `encode` against Transformers on PyTorch, eager and compiled, in alternation.

    python -m benchmarks.inference [--size small] [--texts 512] [--rounds 9] [--one_row 32] [--no_compile]

All: the same texts, vocabulary and weights, float32 but for those named `bfloat16`; from texts to arrays of numpy,
tokenising included. The PyTorch sides take batches of 32 in the order of the input, each padded to its longest text;
`packed` puts several texts into each row of 128 tokens, with attention that stops at their borders. Work: one text; 32
texts of 128 tokens; texts of 20 to 128 tokens, evenly; each as one vector, the mean of its tokens' or with `cls` that
of [CLS], as a classifier reads it, and mixed lengths with a vector a token too. Ratios are electrax / the other of the
same round (below 1 is faster). Shares of the GEMM rate are of the products that each side computes.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from benchmarks.predict import BATCH, LONGEST, get_tokenizer, made_rows, transformers_tokenizer
from benchmarks.report import alternate, environment, ratios, require_cpu, shown, spread, versions, write
from electrax.data.tokenizer import Tokenizer
from electrax.inference.model import PretrainedModel
from electrax.models.encoder import EncoderConfig
from electrax.models.flops import encoder_forward, peak_flops
from electrax.models.products import rounded_layers
from electrax.models.sizes import ModelConfig, discriminator_shape
from electrax.tasks.base import Params
from electrax.tasks.classify import ClassifyTask

Pooling = Literal["mean", "cls"] | None
Encode = Callable[[list[str]], list[np.ndarray]]  # one vector a text, or one a token


def torch_encode(
    encoder: EncoderConfig,
    params: Params,
    tokenizer: Tokenizer,
    pooling: Pooling,
    compiled: str = "",
    half: bool = False,
) -> Encode:
    """As one writes it with Transformers; `compiled` names the shapes to compile for, `half` is bfloat16 autocast."""
    import torch

    from benchmarks.transformers_weights import torch_classifier

    model, fast = torch_classifier(encoder, params).electra, transformers_tokenizer(tokenizer)
    if compiled:
        model = torch.compile(model, dynamic=compiled == "dynamic")

    def encode(texts: list[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for start in range(0, len(texts), BATCH):
            inputs = fast(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                hidden, real = model(**inputs)[0], inputs["attention_mask"]
                if pooling == "cls":
                    hidden = hidden[:, 0]
                elif pooling:
                    hidden = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            found += list(hidden.float().numpy())
        return found

    return encode


def measure(contestants: dict[str, Encode], texts: list[str], lengths: list[int], rounds: int) -> dict:
    """`largest_difference` is that of the numbers of all real tokens, or of the vectors."""
    outputs, first = {}, {}
    for name, encode in contestants.items():
        start = time.perf_counter()
        outputs[name] = encode(texts)  # compiles
        first[name] = time.perf_counter() - start
        encode(texts)
    kept = {name: [a[:n] if a.ndim == 2 else a for a, n in zip(found, lengths, strict=True)]
            for name, found in outputs.items()}  # fmt: skip
    differences = {name: max(float(np.abs(a - b).max()) for a, b in zip(kept["electrax"], found, strict=True))
                   for name, found in kept.items() if name != "electrax"}  # fmt: skip
    seconds = alternate({name: lambda e=encode: e(texts) for name, encode in contestants.items()}, rounds)
    return {
        "texts": len(texts),
        "tokens": sum(lengths),
        "first_call_seconds": first,
        "largest_difference": differences,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": {name: ratios(seconds, "electrax", name) for name in differences},
    }


def make_texts(tokenizer: Tokenizer, one_row: int, count: int) -> dict[str, list[str]]:
    """By work; a made text has as many tokens as it has words and two."""

    words = [word for (text,) in made_rows(tokenizer, 4 * BATCH) for word in text.split()]
    size = LONGEST - 2
    full = [" ".join(words[start : start + size]) for start in range(0, BATCH * size, size)]
    mixed = [text for (text,) in made_rows(tokenizer, count)]
    return {
        "one row": [" ".join(words[: one_row - 2])],
        "full rows": full,
        "full rows, cls": full,
        "mixed": mixed,
        "mixed, cls": mixed,
        "mixed, every token": mixed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--texts", type=int, default=512, help="of mixed lengths")
    parser.add_argument("--one_row", type=int, default=32, help="tokens of the one text")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no_compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    parser.add_argument("--work", nargs="+", help="only these of the work")
    parser.add_argument("--vocabulary", default="../shared/data/vocab/vocab.txt", help="a vocab.txt, lower case")
    options = parser.parse_args()
    require_cpu()
    tokenizer = get_tokenizer(options.vocabulary)
    encoder = discriminator_shape(ModelConfig(size=options.size), tokenizer.vocab_size)
    task = ClassifyTask(encoder, tokenizer.pad_id, tokenizer.sep_id, classes=("a", "b"), style="dense")
    params = jax.jit(task.init)(jax.random.key(0), {"ids": np.ones((1, 8), np.int32)})
    model, half = (
        PretrainedModel(rounded_layers(params, dtype), tokenizer, None, shape, LONGEST, detects=False)
        for dtype in ("float32", "bfloat16")
        for shape in [dataclasses.replace(encoder, compute_dtype=dtype)]
    )
    work = {}
    for name, texts in make_texts(tokenizer, options.one_row, options.texts).items():
        if options.work and name not in options.work:
            continue
        pooling: Pooling = "cls" if "cls" in name else None if "every token" in name else "mean"
        shapes = "dynamic" if "mixed" in name else "static"
        contestants: dict[str, Encode] = {
            "electrax": lambda texts, pooling=pooling: list(model.encode(texts, pooling)),
            "torch": torch_encode(encoder, params, tokenizer, pooling),
            "bfloat16": lambda texts, pooling=pooling: list(half.encode(texts, pooling)),
            "torch.bfloat16": torch_encode(encoder, params, tokenizer, pooling, half=True),
        }
        if name == "mixed":
            contestants["packed"] = lambda texts: list(model.encode(texts, "mean", packed=True))
        if not options.no_compile:
            contestants["torch.compile"] = torch_encode(encoder, params, tokenizer, pooling, shapes)
        lengths = [len(ids) + 2 for ids in tokenizer.encode_batch(texts)]
        work[name] = row = measure(contestants, texts, lengths, options.rounds)
        whole = sum(length * encoder_forward(encoder, length) for length in lengths)
        own = sum(length * encoder_forward(encoder, length, 1 if pooling == "cls" else None) for length in lengths)
        peak_flops.cache_clear()  # of now: the machine may have been disturbed before
        row |= {"flops": whole, "electrax_flops": own, "gemm_flops_per_second": peak_flops(jax.devices()[0])}
        row["share_of_gemm_rate"] = {
            side: (whole if "torch" in side else own) / values["median"] / row["gemm_flops_per_second"]
            for side, values in row["seconds"].items()
        }
        print(f"{options.size}, {name}: {len(texts)} texts, {sum(lengths)} tokens")
        for side, values in row["seconds"].items():
            against = f"; electrax / {side} {shown(row['ratio'][side], 3)}" if side in row["ratio"] else ""
            share = row["share_of_gemm_rate"][side]
            print(f"  {side}: {shown(values, 4)} s, {share:.0%} of the GEMM rate{against}", flush=True)
    results = {"size": options.size, "vocabulary": tokenizer.vocab_size, "work": work}
    write("inference.json", environment(versions("torch", "transformers")) | results)


if __name__ == "__main__":
    main()
