"""Pretraining on one GPU: utilisation against PyTorch, settings one by one, the scatter trap, the host's share.

    python -m benchmarks.accelerator [--parts cases settings lookup host] [--rounds 7] [--steps 20]
                                     [--cases "base, L512" …] [--only remat …]
                                     [--setting "NAME=--section.key=value …" …]
    python -m benchmarks.accelerator --check           # every part once at toy size on the CPU; writes nothing

cases: steps of ELECTRA-Small and Base in bfloat16 with data and optimizer, calls one after the other without waiting,
as XLA has them and with the fused kernels, against Transformers in PyTorch (bfloat16 autocast, SDPA, torch.compile),
which runs in processes of its own, in alternation. MFU is of the device's nominal peak, by the same count of FLOPs on
both sides. settings: each as a ratio to what it changes, small 128 x 128. lookup: the word table's gradient with rows
that are hit often. host: what a call costs the host, as a share of a step, and that nothing compiles after the first
step. Everything is compiled before anything is timed, several programs at a time. Each row is written when it is there.
Without a GPU the exit status is 2.
"""

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pretrain_step import SPECIAL, VOCABULARY, Training, step_config, torch_step
from benchmarks.report import alternate, environment, ratios, shown, spread, versions, write
from electrax.cli import use_compilation_cache
from electrax.models.flops import peak_flops
from electrax.models.lookup import lookup

# -- what is measured --------------------------------------------------------------------------------------------------


STILL_ATTENTION = "--model.attention_dropout=0"  # cuDNN's and XLA's attention have no dropout
CUDNN = f"{STILL_ATTENTION} --model.attention=cudnn"
FUSED = "--model.attention=fused --model.residual=fused"
VARIANTS = {"electrax": "", "electrax, fused": FUSED}


class Case(NamedTuple):
    size: str
    batch: int  # 0: the quickest of FREE_BATCHES
    length: int
    variants: dict[str, str] = VARIANTS  # ways to train it, by words of the command line


CASES = {
    "small, 128 x 128": Case("small", 128, 128),
    "small, free batch": Case("small", 0, 128),
    "base, L128": Case("base", 256, 128),
    "base, L512": Case("base", 64, 512, VARIANTS | {"electrax, cudnn": CUDNN}),
}
TOY_CASES = {"toy": Case("tiny", 4, 32), "toy, free batch": Case("tiny", 0, 32)}
TOY_WORDS = "--model.layers=1 --model.width=32 --model.heads=2 --model.embedding_width=32"
WORDS = "--model.compute_dtype=bfloat16"  # of every training here

# name: (words of the command line, words of what it is compared with, over WORDS); {half} is half of the rows
SETTINGS: dict[str, tuple[str, str]] = {
    "float32": ("--model.compute_dtype=float32", ""),
    "no attention dropout": (STILL_ATTENTION, ""),
    "no dropout": (f"{STILL_ATTENTION} --model.dropout=0", ""),
    "layers scanned": ("--model.scan_layers=true", ""),
    "remat": ("--model.remat=true", ""),
    "two micro-batches": ("--optimizer.microbatch={half}", ""),
    "packed rows": ("--data.layout=packed", ""),
    "1 step a call": ("--steps_per_dispatch=1", ""),
    "vocabulary in two": ("--objective.vocabulary_rows={half}", ""),
    "attention: fused": ("--model.attention=fused", ""),
    "residual: fused": ("--model.residual=fused", ""),
    "both fused": (FUSED, ""),
    "attention: xla": (f"{STILL_ATTENTION} --model.attention=xla", STILL_ATTENTION),
    "attention: cudnn": (CUDNN, STILL_ATTENTION),
    "rows from the host": ("--rows_on_device=never", "--rows_on_device=always"),
    "look-up by scatter": ("--model.lookup_gradient=scatter", "--model.lookup_gradient=summed"),
}
SETTINGS_CASE, TOY_SETTINGS_CASE = Case("small", 128, 128), Case("tiny", 4, 32)
TORCH_MODES = ("default", "reduce-overhead")  # of torch.compile; the second one replays CUDA graphs
FREE_BATCHES = (512, 1024, 2048)
MEMORY_SHARE = 0.6  # of the device, that a step may take: the other programs are there as well
AT_ONCE = 8  # programs that are compiled


class Scale(NamedTuple):
    """What --check makes small."""

    cases: dict[str, Case]
    settings_case: Case
    words: str
    rounds: int
    steps: int  # of a round
    torch_modes: tuple[str, ...]
    free_batches: tuple[int, ...]


# -- trainings ---------------------------------------------------------------------------------------------------------


def make_training(case: Case, words: str) -> Training:
    words = words.replace("{half}", str(max(1, case.batch // 2)))
    return Training(step_config(case.size, case.batch, case.length, *words.split()))


def made(makes: Iterable[Callable[[], Training]]) -> list[Training | Exception]:
    """The trainings, compiled; or why this device or this electrax cannot do one."""

    def make(one: Callable[[], Training]) -> Training | Exception:
        try:
            training = one()
            training.compiled()
            return training
        except Exception as error:
            return error

    with ThreadPoolExecutor(AT_ONCE if jax.default_backend() == "gpu" else 1) as pool:
        return list(pool.map(make, makes))


def run_calls(start: Callable[[], Any], calls: int) -> float:
    """The last loss; the host waits for it alone."""
    for _ in range(calls):
        loss = start()
    return float(loss)


def calls_of(training: Training, steps: int) -> tuple[Callable[[], float], int]:
    """What runs about so many steps, in whole calls, and how many these are."""
    calls = -(-steps // training.steps_a_call)
    return functools.partial(run_calls, training.start, calls), calls * training.steps_a_call


def step_seconds(runs: Mapping[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each contestant in each round, from what runs some steps and how many."""
    only = {name: run for name, (run, _) in runs.items()}
    alternate(only, 1)  # warms up
    return {name: [v / runs[name][1] for v in values] for name, values in alternate(only, rounds).items()}


def needed_bytes(training: Training) -> int:
    memory = training.compiled().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0


class TorchSide:
    """A step of PyTorch in a process of its own, so that neither framework needs the other's memory. It compiles while
    we do."""

    def __init__(self, case: Case, words: str, mode: str):
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"  # where PyTorch has no GPU it says so
        given = json.dumps([case, words, mode, device])
        command = [sys.executable, "-m", "benchmarks.accelerator", "--torch_side", given]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> str:
        """The next one: "ready", a loss, or why there is none."""
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        return "it ended"

    def run(self, steps: int) -> str:
        print(steps, file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self._process.kill()


def serve_torch(case: Case, words: str, mode: str, device: str) -> None:
    """The other end of a TorchSide."""
    try:
        step = torch_step(step_config(case.size, case.batch, case.length, *words.split()), device, True, mode)
        run_calls(step, 4)  # compiles; CUDA graphs are recorded after the first
    except Exception as error:
        print(f"> {type(error).__name__}: {error}".splitlines()[0][:200], flush=True)
        return
    print("> ready", flush=True)
    for line in sys.stdin:
        print(f"> {run_calls(step, int(line))}", flush=True)


def torch_sides(case: Case, scale: Scale) -> dict[str, TorchSide]:
    """By mode of torch.compile."""
    if not find_spec("torch"):
        return {}
    return {f"torch, {mode or 'eager'}": TorchSide(case, scale.words, mode) for mode in scale.torch_modes}


# -- parts -------------------------------------------------------------------------------------------------------------


def measure_cases(scale: Scale, write_rows: Callable[[Any], None]) -> dict[str, Any]:
    peak, result = peak_flops(jax.devices()[0]), {}
    sides = {name: torch_sides(case, scale) for name, case in scale.cases.items() if case.batch}
    wanted = [
        (name, variant, batch)
        for name, case in scale.cases.items()
        for variant in case.variants
        for batch in ([case.batch] if case.batch else scale.free_batches)
    ]

    def make(name: str, variant: str, batch: int) -> Training:
        case = scale.cases[name]
        return make_training(case._replace(batch=batch), f"{scale.words} {case.variants[variant]}")

    trainings = dict(zip(wanted, made([functools.partial(make, *one) for one in wanted]), strict=True))
    compiled = {name: {mode: side.answer() for mode, side in modes.items()} for name, modes in sides.items()}
    for name, case in scale.cases.items():
        row: dict[str, Any] = {**case._asdict(), "tried": {}, "failed": {}, "contestants": {}}
        chosen: dict[str, tuple[int, Training]] = {}
        for variant in case.variants:
            own = {batch: trainings[at] for at in wanted if at[:2] == (name, variant) for batch in [at[2]]}
            row["tried"][variant], chosen[variant] = quickest(own, case.length, scale.steps)
        chosen = {variant: found for variant, found in chosen.items() if found}
        runs = {variant: calls_of(training, scale.steps) for variant, (_, training) in chosen.items()}
        for mode, side in sides.get(name, {}).items():
            if (answer := compiled[name][mode]) != "ready":
                row["failed"][mode] = answer
            else:
                runs[mode] = functools.partial(side.run, scale.steps), scale.steps
        seconds = step_seconds(runs, scale.rounds)
        for contestant, values in seconds.items():
            batch, training = chosen.get(contestant) or next(iter(chosen.values()))
            row["contestants"][contestant] = figures = {
                "batch": batch,
                "flops": training.flops,
                "seconds": spread(values),
                "tokens_per_second": spread([batch * case.length / value for value in values]),
                "mfu": spread([training.flops / value / peak for value in values]),
                "ratio_to": {other: ratios(seconds, contestant, other) for other in seconds if other != contestant},
            }
            if contestant in chosen:
                figures |= {"steps_a_call": training.steps_a_call, "needed_bytes": needed_bytes(training)}
            print(
                f"{name:20}{batch:>6} x {case.length:<5}{contestant:34}"
                f"{figures['seconds']['median'] * 1e3:9.2f} ms{figures['tokens_per_second']['median']:>12,.0f} "
                f"tokens/s   MFU {figures['mfu']['median']:.1%}   "
                + "   ".join(f"{shown(ratio)} of {other}" for other, ratio in figures["ratio_to"].items()),
                flush=True,
            )
        for variant in case.variants.keys() - chosen.keys():
            print(f"{name:20}{variant:34}not here: {row['tried'][variant]}", flush=True)
        result[name] = row
        write_rows({"nominal_peak_flops": peak, "rows": result})
        for side in sides.get(name, {}).values():
            side.close()
    return {"nominal_peak_flops": peak, "rows": result}


def quickest(
    trainings: Mapping[int, Training | Exception], length: int, steps: int
) -> tuple[dict[str, Any], tuple[int, Training] | None]:
    """Of trainings by batch: what each does, in tokens a second or in words, and the quickest with its batch."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    tried: dict[str, Any] = {}
    found: dict[float, tuple[int, Training]] = {}
    for batch, training in trainings.items():
        if isinstance(training, Exception):
            tried[str(batch)] = str(training).splitlines()[0][:200]
        elif limit and needed_bytes(training) > MEMORY_SHARE * limit:
            tried[str(batch)] = f"needs {needed_bytes(training):,} bytes"
        else:
            ((seconds,),) = step_seconds({"": calls_of(training, steps)}, 1).values()
            tried[str(batch)] = rate = batch * length / seconds
            found[rate] = batch, training
    return tried, found[max(found)] if found else None


def measure_settings(
    scale: Scale, settings: dict[str, tuple[str, str]], write_rows: Callable[[Any], None]
) -> dict[str, Any]:
    """Each setting against its own base in alternation; one that this device or this electrax cannot do says why."""
    every = list(dict.fromkeys(words for pair in settings.values() for words in pair))
    trainings = dict(
        zip(
            every,
            made([functools.partial(make_training, scale.settings_case, f"{scale.words} {words}") for words in every]),
            strict=True,
        )
    )
    result: dict[str, Any] = {}
    for name, (words, base) in settings.items():
        pair = {"base": trainings[base], "setting": trainings[words]}
        try:
            for training in pair.values():
                if isinstance(training, Exception):
                    raise training
            seconds = step_seconds({side: calls_of(t, scale.steps) for side, t in pair.items()}, scale.rounds)
        except Exception as error:
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
        write_rows(result)
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
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of the settings")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--setting", nargs="+", default=[], help='more of them, as "NAME=--section.key=value …"')
    parser.add_argument("--check", action="store_true", help="run every part once, small, on the CPU")
    parser.add_argument("--torch_side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch_side:
        case, *rest = json.loads(options.torch_side)
        return serve_torch(Case(*case), *rest)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory as well
    use_compilation_cache()
    if not options.check and jax.default_backend() != "gpu":
        print("benchmarks.accelerator: JAX found no GPU; --check runs every part small on the CPU", file=sys.stderr)
        sys.exit(2)
    cases = {name: CASES[name] for name in options.cases}
    scale = Scale(cases, SETTINGS_CASE, WORDS, options.rounds, options.steps, TORCH_MODES, FREE_BATCHES)
    if options.check:
        scale = Scale(TOY_CASES, TOY_SETTINGS_CASE, f"{WORDS} {TOY_WORDS}", 1, 2, ("",), (4, 8))
    more = [setting.partition("=") for setting in options.setting]
    settings = {name: SETTINGS[name] for name in options.only} | {name: (words, "") for name, _, words in more}
    results: dict[str, Any] = {}
    measure = {
        "cases": lambda: measure_cases(scale, functools.partial(keep, "cases")),
        "settings": lambda: measure_settings(scale, settings, functools.partial(keep, "settings")),
        "lookup": lambda: measure_lookup(scale),
        "host": lambda: measure_host(scale),
    }

    def keep(part: str, rows: Any) -> None:
        """What is there, should a later row fail or the time be over."""
        results[part] = rows
        if not options.check:
            write("accelerator.json", environment(versions("torch", "transformers")) | results)

    for part in options.parts:
        print(f"-- {part}", flush=True)
        keep(part, measure[part]())
        gc.collect()  # trainings that are gone give their memory back
    if options.check:
        print("every part runs; nothing was written")


if __name__ == "__main__":
    main()
