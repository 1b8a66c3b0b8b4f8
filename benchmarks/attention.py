"""Each implementation of attention against the plain one, by length, forward and with backward pass, in alternation.

    python -m benchmarks.attention [--lengths 64 128 256 512] [--heads 4] [--width 64] [--tokens 2048] [--rounds 15]

With a padding mask (rows half to wholly full) and with a document mask (packed rows of three documents). float32 on a
CPU, where PyTorch's scaled_dot_product_attention takes part; bfloat16 on a GPU, where cuDNN's does. First it checks
that outputs and gradients agree, and that under a document mask nothing leaks from one document into another; on a GPU
of the fused kernel too, without and with dropout of the weights. It is not timed here, as it reads queries, keys and
values from one product: benchmarks.accelerator has it in whole steps, and checks it and the fused norm before. Ratios
are to plain in the same round (below 1 is faster).
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import alternate, environment, ratios, shown, spread, versions, write
from electrax.models.attention import Implementation, dot_product_attention
from electrax.models.dropout import dropout
from electrax.models.fused_attention import fits, fused_attention
from electrax.models.fused_norm import norm_of_sum
from electrax.models.masks import document_mask, padding_mask

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}  # of the largest value
SHORTEST_ROUND = 0.05  # seconds, so that a call's own overhead and the clock's steps do not count
DOCUMENTS = 3  # of a packed row
DROPOUT, EPSILON = 0.1, 1e-12  # of the fused kernels' checks

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


def seeds(rows: int) -> jax.Array:
    return jnp.arange(rows, dtype=jnp.uint32)


def attend(q, k, v, mask, implementation: Implementation, rate: float = 0.0) -> jax.Array:
    if implementation == "fused":
        return fused_attention(jnp.stack([q, k, v], axis=3), mask, seeds(len(q)), rate)
    options = {"implementation": implementation, "dropout_rate": rate, "seed": seeds(len(q)), "dtype": q.dtype}
    return dot_product_attention(q, k, v, mask, **options)


def forward(implementation: Implementation) -> Callable:
    return jax.jit(lambda q, k, v, mask: attend(q, k, v, mask, implementation))


def with_backward(implementation: Implementation, rate: float = 0.0) -> Callable:
    """(q, k, v, mask, gradient of the output) -> output and the gradients of q, k and v."""

    def run(q, k, v, mask, gradient):
        output, pull = jax.vjp(lambda *qkv: attend(*qkv, mask, implementation, rate), q, k, v)
        return output, *pull(gradient.astype(output.dtype))

    return jax.jit(run)


# -- checks ------------------------------------------------------------------------------------------------------------


def largest_share(found: Iterable[jax.Array], wanted: Iterable[jax.Array]) -> float:
    """The largest difference, as a share of the largest value of its array; NaN where one is."""
    pairs = zip(found, wanted, strict=True)
    return float(np.max([jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)) for a, b in pairs]))


def disagreement(implementation: Implementation, inputs: list[jax.Array], mask: jax.Array, rate: float = 0.0) -> float:
    """That of outputs and gradients from plain in float32."""
    q, k, v, gradient = inputs
    found = with_backward(implementation, rate)(q, k, v, mask, gradient)
    q, k, v, gradient = (x.astype(jnp.float32) for x in inputs)
    return largest_share(found, with_backward("plain", rate)(q, k, v, mask, gradient))


def leaks(implementation: Implementation, inputs: list[jax.Array], mask: jax.Array) -> bool:
    """Whether the first document's outputs change with the values of the others, or its loss has a gradient there."""
    q, k, v, gradient = inputs
    first = jnp.asarray(document_numbers(*q.shape[:2]) == 1)[..., None, None]
    other = [jnp.where(first, x, 3 * x + 1) for x in (q, k, v)]
    run = forward(implementation)
    outputs = [np.asarray(jnp.where(first, run(*qkv, mask), 0)) for qkv in ((q, k, v), other)]
    _, *gradients = with_backward(implementation)(q, k, v, mask, jnp.where(first, gradient, 0))
    stray = any(bool(jnp.any(jnp.where(first, 0, g) != 0)) for g in gradients)
    return stray or not np.array_equal(*outputs)


def check(
    inputs: list[jax.Array], masks: dict[str, jax.Array], names: Sequence[Implementation]
) -> dict[str, dict[str, float]]:
    """The disagreement by mask and implementation; SystemExit where one is too large or something leaks."""
    dtype, found = str(inputs[0].dtype), {}
    for kind, mask in masks.items():
        found[kind] = {name: disagreement(name, inputs, mask) for name in names}
        if "fused" in names:
            found[kind][f"fused, dropout {DROPOUT}"] = disagreement("fused", inputs, mask, DROPOUT)
        for name, share in found[kind].items():
            require(share, dtype, f"{name}, {kind} mask")
        for name in names:
            if kind == "documents" and leaks(name, inputs, mask):
                raise SystemExit(f"{name}: one document's values leak into another")
    return found


def check_norm(rows: int, length: int, width: int, dtype: str) -> dict[str, float]:
    """The disagreement of the fused kernel of dropout, sum and LayerNorm from these in float32, of output and
    gradients, by rate of dropout; SystemExit where it is too large."""
    random = np.random.default_rng(0)
    states = [jnp.asarray(random.standard_normal((rows, length, width)), dtype) for _ in range(3)]
    vectors = [jnp.asarray(random.standard_normal(width), jnp.float32) for _ in range(2)]

    def plain(x, part, scale, bias, rate):
        norm = nn.LayerNorm(EPSILON, use_fast_variance=False)
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x + dropout(part, rate, seeds(rows)))

    def fused(x, part, scale, bias, rate):
        return norm_of_sum(x, part, scale, bias, seeds(rows), rate, EPSILON)

    def run(norm, rate, x, part, slope):
        output, pull = jax.vjp(lambda *values: norm(*values, rate), x, part, *vectors)
        return output, *pull(slope)

    found = {}
    for rate in (0.0, DROPOUT):
        ours = jax.jit(run, static_argnums=(0, 1))(fused, rate, *states)
        wanted = jax.jit(run, static_argnums=(0, 1))(plain, rate, *(x.astype(jnp.float32) for x in states))
        found[f"dropout {rate}"] = share = largest_share(ours, wanted)
        require(share, dtype, f"fused norm of {length} x {width}, dropout {rate}")
    return found


def require(share: float, dtype: str, what: str) -> None:
    if not share <= TOLERANCE[dtype]:  # nor NaN
        raise SystemExit(f"{what}: differs from plain by {share:.1e} of the largest value")


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
        fused = ["fused"] if not on_cpu and fits(length, options.width) else []
        agreement = check(inputs, masks, implementations() + fused)
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
