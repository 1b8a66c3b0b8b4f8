"""Pretraining on one GPU: utilisation against PyTorch, settings one by one, the scatter trap, the host's share.

    python -m benchmarks.accelerator [--parts cases settings lookup host] [--rounds 7] [--steps 20]
                                     [--setting "NAME=--section.key=value …" …]
    python -m benchmarks.accelerator --check           # every part once at toy size on the CPU; writes nothing

cases: steps of ELECTRA-Small and Base in bfloat16 with data and optimizer, calls one after the other without waiting,
against Transformers in PyTorch (bfloat16 autocast, SDPA, torch.compile) in alternation. MFU is of the device's nominal
peak, by the same count of FLOPs on both sides. settings: each as a ratio to what it changes, small 128 x 128. lookup:
the word table's gradient with rows that are hit often. host: what a call costs the host, as a share of a step, and that
nothing compiles after the first step. Without a GPU the exit status is 2.
"""

import argparse
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pretrain_step import SPECIAL, VOCABULARY, Training, step_config, torch_step
from benchmarks.report import alternate, environment, ratios, shown, spread, versions, write
from electrax.config import UserError
from electrax.models.flops import peak_flops
from electrax.models.lookup import lookup

# -- what is measured --------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    size: str
    batch: int  # 0: the quickest power of two that fits
    length: int


CASES = {
    "small, 128 x 128": Case("small", 128, 128),
    "small, free batch": Case("small", 0, 128),
    "base, L128": Case("base", 256, 128),
    "base, L512": Case("base", 64, 512),
}
TOY_CASES = {"toy": Case("tiny", 4, 32), "toy, free batch": Case("tiny", 0, 32)}
TOY_WORDS = "--model.layers=1 --model.width=32 --model.embedding_width=32"
WORDS = "--model.compute_dtype=bfloat16"  # of every training here
STILL_ATTENTION = "--model.attention_dropout=0"  # cuDNN's and XLA's attention have no dropout

# name: (words of the command line, words of what it is compared with, over WORDS); {half} is half of the rows
SETTINGS: dict[str, tuple[str, str]] = {
    "float32": ("--model.compute_dtype=float32", ""),
    "no attention dropout": (STILL_ATTENTION, ""),
    "no dropout": (f"{STILL_ATTENTION} --model.dropout=0", ""),
    "layers scanned": ("--model.scan_layers=true", ""),
    "remat": ("--model.remat=true", ""),
    "two micro-batches": ("--optimizer.microbatch={half}", ""),
    "packed rows": ("--data.layout=packed", ""),
    "4 steps a call": ("--steps_per_dispatch=4", ""),
    "vocabulary in two": ("--objective.vocabulary_rows={half}", ""),
    "attention: xla": (f"{STILL_ATTENTION} --model.attention=xla", STILL_ATTENTION),
    "attention: cudnn": (f"{STILL_ATTENTION} --model.attention=cudnn", STILL_ATTENTION),
    "rows from the host": ("--rows_on_device=never", "--rows_on_device=always"),
    "look-up by scatter": ("--model.lookup_gradient=scatter", "--model.lookup_gradient=summed"),
}
SETTINGS_CASE, TOY_SETTINGS_CASE = Case("small", 128, 128), Case("tiny", 4, 32)
TORCH_MODES = ("default", "max-autotune-no-cudagraphs")  # of torch.compile
MOST_BATCH = 16384
MEMORY_SHARE = 0.9  # of the device, that a step may take
WORTHWHILE = 1.02  # a batch twice as large must give so much more tokens a second


class Scale(NamedTuple):
    """What --check makes small."""

    cases: dict[str, Case]
    settings_case: Case
    words: str
    rounds: int
    steps: int  # of a round
    torch_modes: tuple[str, ...]
    most_batch: int


# -- trainings ---------------------------------------------------------------------------------------------------------


def make_training(case: Case, words: str) -> Training:
    half = str(max(1, case.batch // 2))
    return Training(step_config(case.size, case.batch, case.length, *words.replace("{half}", half).split()))


def run_calls(start: Callable[[], Any], calls: int) -> float:
    """The last loss; the host waits for it alone."""
    for _ in range(calls):
        loss = start()
    return float(loss)


def step_seconds(starts: Mapping[str, tuple[Callable[[], Any], int]], scale: Scale) -> dict[str, list[float]]:
    """Seconds a step of each contestant in each round, from what starts a call and how many steps a call takes."""
    runs, steps = {}, {}
    for name, (start, each) in starts.items():
        run_calls(start, 2)  # compiles
        calls = -(-scale.steps // each)
        runs[name], steps[name] = functools.partial(run_calls, start, calls), calls * each
    return {name: [v / steps[name] for v in values] for name, values in alternate(runs, scale.rounds).items()}


def needed_bytes(training: Training) -> int:
    memory = training.compiled().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0


def free_batch(case: Case, scale: Scale) -> tuple[int, dict[str, float]]:
    """The quickest batch that fits, doubled as long as that pays, and tokens a second of all that were tried."""
    limit, rates, batch = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0), {}, case.batch or 128
    best = 0.0
    while batch <= scale.most_batch:
        try:
            training = make_training(case._replace(batch=batch), scale.words)
            if limit and needed_bytes(training) > MEMORY_SHARE * limit:
                break
            run_calls(training.start, 2)  # compiles
            began = time.perf_counter()
            run_calls(training.start, 5)
            rates[str(batch)] = 5 * training.steps_a_call * batch * case.length / (time.perf_counter() - began)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            break
        if rates[str(batch)] < WORTHWHILE * best:
            break
        best, batch = rates[str(batch)], 2 * batch
    if not rates:
        raise SystemExit(f"{case.size}: not even {batch} rows of {case.length} fit the device")
    return int(max(rates, key=rates.__getitem__)), rates


def torch_contestants(case: Case, scale: Scale) -> dict[str, Callable[[], Any]]:
    """By mode of torch.compile; empty where PyTorch has no GPU and we have."""
    try:
        import torch
    except ImportError:
        return {}
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return {}
    config = step_config(case.size, case.batch, case.length, *scale.words.split())
    found = {}
    for mode in scale.torch_modes:
        step = torch_step(config, "cuda" if on_gpu else "cpu", autocast=True, compile_mode=mode)
        try:
            run_calls(step, 2)  # compiles
        except torch.OutOfMemoryError:
            continue
        found[f"torch, {mode or 'eager'}"] = step
    return found


def tidy() -> None:
    """Gives the memory of trainings that are gone back, so that the next ones find it."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


# -- parts -------------------------------------------------------------------------------------------------------------


def measure_cases(scale: Scale) -> dict[str, Any]:
    peak, result = peak_flops(jax.devices()[0]), {}
    for name, case in scale.cases.items():
        tried = {}
        if not case.batch:
            batch, tried = free_batch(case._replace(batch=4 if case.size == "tiny" else 128), scale)
            case = case._replace(batch=batch)
            tidy()
        training = make_training(case, scale.words)
        starts = {"electrax": (training.start, training.steps_a_call)}
        starts |= {mode: (step, 1) for mode, step in torch_contestants(case, scale).items()}
        seconds = step_seconds(starts, scale)
        row: dict[str, Any] = {**case._asdict(), "flops": training.flops, "tried": tried, "contestants": {}}
        for contestant, values in seconds.items():
            row["contestants"][contestant] = figures = {
                "seconds": spread(values),
                "tokens_per_second": spread([case.batch * case.length / value for value in values]),
                "mfu": spread([training.flops / value / peak for value in values]),
                "electrax_ratio": ratios(seconds, "electrax", contestant),
            }
            print(
                f"{name:20}{case.batch:>6} x {case.length:<5}{contestant:34}"
                f"{figures['seconds']['median'] * 1e3:9.2f} ms{figures['tokens_per_second']['median']:>12,.0f} "
                f"tokens/s   MFU {figures['mfu']['median']:.1%}   electrax takes {shown(figures['electrax_ratio'])}",
                flush=True,
            )
        result[name] = row
        del training, starts
        tidy()
    return {"nominal_peak_flops": peak, "rows": result}


def measure_settings(scale: Scale, settings: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Each setting against its own base in alternation; one that this device or this electrax cannot do says why."""
    result: dict[str, Any] = {}
    held: tuple[str, Training] | None = None  # a base that several settings share compiles once
    for name, (words, base) in settings.items():
        try:
            if held is None or held[0] != base:
                held = None
                tidy()
                held = base, make_training(scale.settings_case, f"{scale.words} {base}")
            pair = {"base": held[1], "setting": make_training(scale.settings_case, f"{scale.words} {words}")}
            seconds = step_seconds({side: (t.start, t.steps_a_call) for side, t in pair.items()}, scale)
        except (UserError, ValueError, RuntimeError, NotImplementedError) as error:
            result[name] = {"words": words, "failed": str(error).splitlines()[0][:160]}
            print(f"{name:24}not here: {result[name]['failed']}", flush=True)
            continue
        result[name] = {
            "words": words,
            "base": base,
            "seconds": {side: spread(values) for side, values in seconds.items()},
            "ratio": ratios(seconds, "setting", "base"),
            "needed_bytes": {side: needed_bytes(training) for side, training in pair.items()},
        }
        print(f"{name:24}{shown(result[name]['ratio'])} of {base or 'the default'}", flush=True)
        del pair
        tidy()
    return result


def masked_ids(rows: int, length: int, share: float) -> np.ndarray:
    """Ordinary tokens, with [CLS] and [SEP] at the ends and that share of [MASK]."""
    random = np.random.default_rng(0)
    ids = random.integers(1000, VOCABULARY, (rows, length)).astype(np.int32)
    ids[random.random(ids.shape) < share] = SPECIAL["mask"]
    if share:
        ids[:, 0], ids[:, -1] = SPECIAL["cls"], SPECIAL["sep"]
    return ids


def lookup_gradients(vocabulary: int) -> dict[str, Callable]:
    """Ways to the gradient of table[ids] from that of the result: (ids [B, L], slope [B, L, E]) -> [V, E]."""

    def scatter(ids, slope):
        return jnp.zeros((vocabulary, slope.shape[-1])).at[ids].add(slope)

    def sorted_segments(ids, slope):
        flat, slope = ids.reshape(-1), slope.reshape(-1, slope.shape[-1])
        order = jnp.argsort(flat)
        return jax.ops.segment_sum(slope[order], flat[order], vocabulary, indices_are_sorted=True)

    def one_hot(ids, slope):
        def add(total, row):
            hot = jax.nn.one_hot(row[0], vocabulary, dtype=jnp.bfloat16)
            product = jnp.einsum("lv,le->ve", hot, row[1].astype(hot.dtype), preferred_element_type=jnp.float32)
            return total + product, None

        cut = max(1, ids.size // 4096)  # products of about 4,096 tokens
        parts = jax.tree.map(lambda x: x.reshape(cut, -1, *x.shape[2:]), (ids, slope))
        return jax.lax.scan(add, jnp.zeros((vocabulary, slope.shape[-1])), parts)[0]

    def summed(ids, slope):
        table = jnp.zeros((vocabulary, slope.shape[-1]))
        return jax.vjp(lambda t: lookup(t, ids, "summed"), table)[1](slope)[0]

    return {"scatter": scatter, "electrax, summed": summed, "sorted": sorted_segments, "one-hot product": one_hot}


def measure_lookup(scale: Scale) -> dict[str, Any]:
    """Seconds of each way with 15 % [MASK], and the ratio to a scatter of tokens that are all different enough."""
    case, width = scale.settings_case, 128
    vocabulary = VOCABULARY + -VOCABULARY % 128
    slope = jnp.asarray(np.random.default_rng(0).standard_normal((case.batch, case.length, width)), jnp.float32)
    hot, even = (jnp.asarray(masked_ids(case.batch, case.length, share)) for share in (0.15, 0.0))
    ways = {name: (jax.jit(way), hot) for name, way in lookup_gradients(vocabulary).items()}
    wanted = np.asarray(ways["scatter"][0](hot, slope))
    for name, (way, ids) in ways.items():
        difference = np.abs(np.asarray(way(ids, slope)) - wanted).max() / np.abs(wanted).max()
        if difference > 1e-2:  # the one-hot product rounds to bfloat16
            raise SystemExit(f"look-up gradient, {name}: differs by {difference:.1e} of the largest value")
    ways["scatter, no hot rows"] = (ways["scatter"][0], even)
    runs = {
        n: lambda w=w: jax.block_until_ready([w[0](w[1], slope) for _ in range(scale.steps)]) for n, w in ways.items()
    }
    alternate(runs, 1)
    seconds = alternate(runs, scale.rounds)
    result = {}
    for name, values in seconds.items():
        result[name] = {
            "seconds": spread([value / scale.steps for value in values]),
            "ratio": ratios(seconds, name, "scatter, no hot rows"),
        }
        print(
            f"{name:24}{result[name]['seconds']['median'] * 1e3:9.3f} ms   {shown(result[name]['ratio'])}", flush=True
        )
    return result


def measure_host(scale: Scale) -> dict[str, Any]:
    """What a call costs the host while the device is free, of the time of a step, and the compilations after step 1."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    training = make_training(scale.settings_case, scale.words)
    run_calls(training.start, 1)
    jax.monitoring.register_event_duration_secs_listener(listen)
    per_call, per_step = [], []
    for _ in range(scale.steps):
        jax.block_until_ready(training.state)
        began = time.perf_counter()
        loss = training.start()
        per_call.append(time.perf_counter() - began)
        float(loss)
    for _ in range(scale.rounds):
        began = time.perf_counter()
        run_calls(training.start, scale.steps)
        per_step.append((time.perf_counter() - began) / scale.steps)
    late = len(compiled)
    jax.jit(lambda x: x + 1).lower(np.zeros(3, np.float32)).compile()  # shows that the listener hears
    if len(compiled) == late:
        raise SystemExit("JAX reported no compilation: its event has another name")
    share = spread([np.median(per_call) / value for value in per_step])
    print(f"host {np.median(per_call) * 1e3:.2f} ms a call, {shown(share)} of it; {late} compilations after step 1")
    return {
        "host_seconds": spread(per_call),
        "call_seconds": spread(per_step),
        "share": share,
        "compilations_after_first_step": late,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("cases", "settings", "lookup", "host")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--setting", nargs="+", default=[], help='more of them, as "NAME=--section.key=value …"')
    parser.add_argument("--check", action="store_true", help="run every part once, small, on the CPU")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory as well
    if not options.check and jax.default_backend() != "gpu":
        print("benchmarks.accelerator: JAX found no GPU; --check runs every part small on the CPU", file=sys.stderr)
        sys.exit(2)
    scale = Scale(CASES, SETTINGS_CASE, WORDS, options.rounds, options.steps, TORCH_MODES, MOST_BATCH)
    if options.check:
        scale = Scale(TOY_CASES, TOY_SETTINGS_CASE, f"{WORDS} {TOY_WORDS}", 1, 2, ("",), 8)
    more = [setting.partition("=") for setting in options.setting]
    settings = SETTINGS | {name: (words, "") for name, _, words in more}
    measure = {
        "cases": lambda: measure_cases(scale),
        "settings": lambda: measure_settings(scale, settings),
        "lookup": lambda: measure_lookup(scale),
        "host": lambda: measure_host(scale),
    }
    results: dict[str, Any] = {}
    for part in options.parts:
        print(f"-- {part}", flush=True)
        results[part] = measure[part]()
        if not options.check:  # what is there is kept, should a later part fail
            write("accelerator.json", environment(versions("torch", "transformers")) | results)
    if options.check:
        print("every part runs; nothing was written")


if __name__ == "__main__":
    main()
