"""Decoding: a GPT-2-shaped model against Transformers' `generate` in alternation, and what a beam costs.

    python -m benchmarks.decoding [--rounds 7] [--prompt 32] [--tokens 64] [--layers 12]

Both: float32, random weights of GPT-2 small's shape (12 x 768, 50,257 tokens), greedy, a cache of keys and values, no
end before the last token. Ratios are electrax / Transformers of the same round (below 1 is faster). A beam of 4 is
compared with four times as many greedy rows, for a translator of 4 + 4 layers, 256 wide, and 6,000 tokens.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import alternate, environment, ratios, require_cpu, shown, spread, versions, write
from electrax.inference.generation import continue_rows
from electrax.models.decoding import Sampling
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.generator import Generator
from electrax.report.common import show_table
from electrax.tasks.rewrite import RewriteTask

VOCABULARY, WIDTH, HEADS = 50257, 768, 12
BATCHES = (1, 16)


def electrax_generate(layers: int, tokens: int, longest: int) -> Callable[[np.ndarray], None]:
    config = EncoderConfig(VOCABULARY, layers, WIDTH, HEADS, 4 * WIDTH, WIDTH, longest, body="gpt2")

    def draw(key):
        ids = jnp.zeros((1, 2), jnp.int32)
        table, embedded = Embeddings(config).init_with_output(key, ids)[::-1]
        table = table["params"]
        mask = jnp.ones((1, 1, 1, 2), bool)
        return {
            "embeddings": table,
            "generator": Generator(config, "causal").init(key, embedded, table["word"], mask)["params"],
        }

    params = jax.jit(draw)(jax.random.key(0))
    program = jax.jit(functools.partial(continue_rows, config, tokens, Sampling(), -1, 0, (VOCABULARY - 1,)))

    def run(ids: np.ndarray) -> None:
        rows = len(ids)
        keys = jax.random.split(jax.random.key(0), rows)
        limits = np.full(rows, tokens, np.int32)
        found = program(params, ids, np.full(rows, ids.shape[1], np.int32), limits, keys)
        assert np.asarray(found.lengths).tolist() == [tokens] * rows

    return run


def transformers_generate(layers: int, tokens: int, longest: int) -> Callable[[np.ndarray], None]:
    import torch
    import transformers

    shape = {"n_embd": WIDTH, "n_layer": layers, "n_head": HEADS, "n_positions": longest}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **shape)).eval()

    def run(ids: np.ndarray) -> None:
        given = torch.tensor(ids, dtype=torch.long)
        with torch.inference_mode():
            found = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        assert found.shape[1] == ids.shape[1] + tokens

    return run


def translator(tokens: int) -> tuple[RewriteTask, dict]:
    """One that never comes to an end, so that every beam and row has as many tokens."""
    shape = EncoderConfig(6000, 4, 256, 4, 512, 256, 128, body="modern")
    task = RewriteTask(shape, 0, 3, decoder=shape, cls_id=2, end_id=-1, most=tokens, metric="loss")
    batch = {"ids": np.zeros((1, 2), np.int32)}
    return task, jax.jit(lambda key: task.init(key, batch))(jax.random.key(0))


def beam_seconds(rounds: int, tokens: int, rows: int = 8) -> dict[str, list[float]]:
    task, params = translator(tokens)
    ids = np.random.default_rng(0).integers(5, 6000, (4 * rows, 24)).astype(np.int32)
    programs = {n: jax.jit(functools.partial(task.rewrite, beams=n)) for n in (1, 4)}
    contestants = {
        f"{4 * rows} greedy rows": lambda: jax.block_until_ready(programs[1](params, ids)),
        f"{rows} rows, beam 4": lambda: jax.block_until_ready(programs[4](params, ids[:rows])),
    }
    alternate(contestants, 1)  # compiles
    return alternate(contestants, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--check", action="store_true", help="keep no results")
    arguments = parser.parse_args()
    require_cpu()
    options = (arguments.layers, arguments.tokens, arguments.prompt + arguments.tokens)
    makers = {"electrax": electrax_generate, "transformers": transformers_generate}
    runs = {name: make(*options) for name, make in makers.items()}
    results: dict = {}
    for batch in BATCHES:
        ids = np.random.default_rng(0).integers(5, VOCABULARY, (batch, arguments.prompt)).astype(np.int32)
        contestants = {name: functools.partial(run, ids) for name, run in runs.items()}
        alternate(contestants, 1)  # compiles
        seconds = alternate(contestants, arguments.rounds)
        ratio = ratios(seconds, "electrax", "transformers")
        results[f"greedy, {batch} rows"] = {"seconds": {n: spread(s) for n, s in seconds.items()}, "ratio": ratio}
    seconds = beam_seconds(arguments.rounds, arguments.tokens)
    greedy, beam = seconds
    results["beam 4"] = {"seconds": {n: spread(s) for n, s in seconds.items()}, "ratio": ratios(seconds, beam, greedy)}
    rows = []
    for name, found in results.items():
        medians = (f"{statistics.median([s['median']]) * 1000:,.0f} ms ({who})" for who, s in found["seconds"].items())
        rows.append((name, *medians, shown(found["ratio"])))
    show_table("decoding", ("what", "one", "other", "ratio"), rows)
    if not arguments.check:
        described = environment(versions("torch", "transformers"))
        write("decoding.json", {"environment": described, "options": vars(arguments), "results": results})


if __name__ == "__main__":
    main()
