"""Each implementation of attention against the plain one, by length, forward and with backward pass, in alternation.

    python -m benchmarks.attention [--lengths 64 128 256 512] [--heads 4] [--width 64] [--tokens 2048] [--rounds 15]

With a padding mask (rows half to wholly full) and with a document mask (packed rows of three documents). float32 on a
CPU, where PyTorch's scaled_dot_product_attention takes part; bfloat16 on a GPU, where cuDNN's does. First it checks
that outputs and gradients agree, and that under a document mask nothing leaks from one document into another. Ratios
are to plain in the same round (below 1 is faster).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import alternate, environment, ratios, shown, spread, versions, write
from electrax.models.attention import Implementation, dot_product_attention
from electrax.models.masks import document_mask, padding_mask

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}  # of the largest value
SHORTEST_ROUND = 0.05  # seconds, so that a call's own overhead and the clock's steps do not count
DOCUMENTS = 3  # of a packed row

Pass = Callable[[], Any]


def implementations() -> list[Implementation]:
    return ["plain", "xla"] if jax.default_backend() == "cpu" else ["plain", "xla", "cudnn"]


def document_numbers(rows: int, length: int) -> np.ndarray:
    """1, 2, 3 along each row, cut where chance says."""
    random = np.random.default_rng(1)
    cuts = np.stack([np.sort(random.choice(length - 1, DOCUMENTS - 1, replace=False)) + 1 for _ in range(rows)])
    return 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)


def make_mask(kind: str, rows: int, length: int) -> jax.Array:
    if kind == "documents":
        return document_mask(jnp.asarray(document_numbers(rows, length)))
    lengths = np.random.default_rng(1).integers(length // 2, length + 1, rows)
    return padding_mask(jnp.asarray(np.arange(length)[None] < lengths[:, None]))


def make_inputs(rows: int, length: int, heads: int, width: int, dtype: str) -> list[jax.Array]:
    """Queries, keys, values and the gradient of the output."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((rows, length, heads, width)), dtype) for _ in range(4)]


def forward(implementation: Implementation) -> Callable:
    return jax.jit(lambda q, k, v, mask: dot_product_attention(q, k, v, mask, implementation=implementation))


def with_backward(implementation: Implementation) -> Callable:
    """(q, k, v, mask, gradient of the output) -> output and the gradients of q, k and v."""

    def run(q, k, v, mask, gradient):
        attend = lambda *qkv: dot_product_attention(*qkv, mask, implementation=implementation)  # noqa: E731
        output, pull = jax.vjp(attend, q, k, v)
        return output, *pull(gradient)

    return jax.jit(run)


# -- checks ------------------------------------------------------------------------------------------------------------


def disagreement(implementation: Implementation, inputs: list[jax.Array], mask: jax.Array) -> float:
    """The largest difference of outputs and gradients from plain in float32, as a share of the largest value."""
    q, k, v, gradient = (x.astype(jnp.float32) for x in inputs)
    wanted = with_backward("plain")(q, k, v, mask, gradient)
    q, k, v, gradient = inputs
    found = with_backward(implementation)(q, k, v, mask, gradient)
    pairs = zip(found, wanted, strict=True)
    return max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def leaks(implementation: Implementation, inputs: list[jax.Array], mask: jax.Array) -> bool:
    """Whether the first document's outputs change with the values of the others, or its loss has a gradient there."""
    q, k, v, gradient = inputs
    first = jnp.asarray(document_numbers(*q.shape[:2]) == 1)[..., None, None]
    other = [jnp.where(first, x, 3 * x + 1) for x in (q, k, v)]
    attend = forward(implementation)
    outputs = [np.asarray(jnp.where(first, attend(*qkv, mask), 0)) for qkv in ((q, k, v), other)]
    _, *gradients = with_backward(implementation)(q, k, v, mask, jnp.where(first, gradient, 0))
    stray = any(bool(jnp.any(jnp.where(first, 0, g) != 0)) for g in gradients)
    return stray or not np.array_equal(*outputs)


def check(inputs: list[jax.Array], masks: dict[str, jax.Array]) -> dict[str, dict[str, float]]:
    """The disagreement by mask and implementation; SystemExit where one is too large or something leaks."""
    tolerance, found = TOLERANCE[str(inputs[0].dtype)], {}
    for kind, mask in masks.items():
        found[kind] = {name: disagreement(name, inputs, mask) for name in implementations()}
        for name, share in found[kind].items():
            if share > tolerance:
                raise SystemExit(f"{name}, {kind} mask: differs from plain by {share:.1e} of the largest value")
            if kind == "documents" and leaks(name, inputs, mask):
                raise SystemExit(f"{name}: one document's values leak into another")
    return found


# -- contestants -------------------------------------------------------------------------------------------------------


def electrax_passes(inputs: list[jax.Array], mask: jax.Array, backward: bool) -> dict[str, Pass]:
    q, k, v, gradient = inputs
    values = (q, k, v, mask, gradient) if backward else (q, k, v, mask)
    functions = {name: (with_backward if backward else forward)(name) for name in implementations()}
    return {name: lambda f=f: jax.block_until_ready(f(*values)) for name, f in functions.items()}


def torch_pass(inputs: list[jax.Array], mask: jax.Array, backward: bool) -> Pass:
    """As Transformers calls it: heads before positions, and back."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, gradient = (torch.from_numpy(np.array(x)) for x in inputs)
    allowed = torch.from_numpy(np.array(mask))

    def attend():
        output = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed)
        return output.transpose(1, 2).contiguous()

    def run_forward():
        with torch.inference_mode():
            return attend()

    def run_backward():
        return torch.autograd.grad(attend(), (q, k, v), gradient)

    if not backward:
        return run_forward
    for x in (q, k, v):
        x.requires_grad_()
    return run_backward


def measure(contestants: dict[str, Pass], rounds: int) -> dict[str, Any]:
    """Seconds of a call and ratios to plain; a round repeats the call as often as the fastest one needs."""
    for run in contestants.values():
        run()  # compiles
    fastest = min(values[0] for values in alternate(contestants, 1).values())
    repeat = max(1, round(SHORTEST_ROUND / fastest))
    repeated = {name: lambda run=run: [run() for _ in range(repeat)] for name, run in contestants.items()}
    seconds = alternate(repeated, rounds)
    return {
        "seconds": {name: spread([value / repeat for value in values]) for name, values in seconds.items()},
        "ratio": {name: ratios(seconds, name, "plain") for name in seconds if name != "plain"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--tokens", type=int, default=0, help="of a batch; 0: 2,048 on a CPU, 65,536 elsewhere")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    dtype, tokens = ("float32", options.tokens or 2048) if on_cpu else ("bfloat16", options.tokens or 65536)
    cases, start = [], time.perf_counter()
    for length in options.lengths:
        rows = max(1, tokens // length)
        inputs = make_inputs(rows, length, options.heads, options.width, dtype)
        masks = {kind: make_mask(kind, rows, length) for kind in ("padding", "documents")}
        agreement = check(inputs, masks)
        for kind, mask in masks.items():
            for backward in (False, True):
                contestants = electrax_passes(inputs, mask, backward)
                if on_cpu:
                    contestants["torch"] = torch_pass(inputs, mask, backward)
                case = {"length": length, "rows": rows, "mask": kind, "backward": backward}
                case |= {"disagreement": agreement[kind], **measure(contestants, options.rounds)}
                cases.append(case)
                print(
                    f"{rows:>4} x {length:<4}{kind:10}{'forward + backward' if backward else 'forward':19}"
                    f"plain {case['seconds']['plain']['median'] * 1e3:8.2f} ms   "
                    + "   ".join(f"{name} {shown(ratio)}" for name, ratio in case["ratio"].items()),
                    flush=True,
                )
    print(f"all agree within {TOLERANCE[dtype]:g}, nothing leaks; {time.perf_counter() - start:.0f} s")
    results = {"dtype": dtype, "heads": options.heads, "head_width": options.width, "cases": cases}
    write("attention.json", environment(versions("torch") if on_cpu else None) | results)


if __name__ == "__main__":
    main()
