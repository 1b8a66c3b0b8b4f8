"""Pretraining on one GPU: utilisation against PyTorch, settings one by one, the scatter trap, the host's share.

    python -m benchmarks.accelerator [--parts checks cases settings lookup host] [--rounds 7] [--steps 20]
                                     [--cases "base, L512" …] [--only remat …]
                                     [--setting "NAME=--section.key=value …" …]
    python -m benchmarks.accelerator --check           # every part once at toy size on the CPU; writes nothing

checks: the fused kernels agree with the plain path, gradients too, and leak nothing; where not, nothing is measured.
cases: steps of ELECTRA-Small and Base in bfloat16 with data and optimizer, calls one after the other without waiting,
as XLA has them and with the fused kernels, against Transformers in PyTorch (bfloat16 autocast, SDPA, torch.compile)
with the same dropout and batch, which runs in processes of its own, in alternation. MFU is of the device's peak for
bfloat16, by the same count of FLOPs on both sides; ratios are of the time of a token. settings: each as a ratio to what
it changes, small 128 x 128. lookup: the word table's gradient with rows that are hit often. host: the CPU time of the
training loop's thread as a share of a step, and that nothing compiles after the first step. XLA has the flags that the
commands set. It chooses kernels by their time, so JAX compiles while nothing else is on the GPU, a case before its
PyTorch, and at most two programs at a time. Each row is written when it is there. Without a GPU the exit status is 2.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import check, check_norm, make_inputs, make_mask
from benchmarks.pretrain_step import SPECIAL, VOCABULARY, RandomCorpus, Training, step_config, torch_step
from benchmarks.report import alternate, environment, ratios, shown, spread, versions, write
from electrax.cli import use_compilation_cache
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import make_feed, make_task
from electrax.experiment.run import Run, assemble, mesh_for
from electrax.models.flops import peak_flops
from electrax.models.lookup import lookup
from electrax.training.state import choose_together
from electrax.xla_flags import use_flags

# -- what is measured --------------------------------------------------------------------------------------------------


STILL_ATTENTION = "--model.attention_dropout=0"  # cuDNN's and XLA's attention have no dropout
CUDNN = "--model.attention=cudnn"
FUSED = "--model.attention=fused --model.residual=fused"
VARIANTS = {"electrax": "", "electrax, fused": FUSED}


class Case(NamedTuple):
    size: str
    batch: int  # 0: the quickest of FREE_BATCHES
    length: int
    variants: dict[str, str] = VARIANTS  # ways to train it, by words of the command line
    words: str = ""  # of every variant, and of PyTorch


CASES = {
    "small, 128 x 128": Case("small", 128, 128),
    "small, free batch": Case("small", 0, 128),
    "base, L128": Case("base", 256, 128),
    "base, L512": Case("base", 64, 512),
    "base, L512, cudnn": Case("base", 64, 512, {"electrax, cudnn": CUDNN}, STILL_ATTENTION),
}
TOY_CASES = {
    "toy": Case("tiny", 4, 32),
    "toy, free batch": Case("tiny", 0, 32),
    "toy, cudnn": Case("tiny", 4, 32, {"electrax": "", "electrax, cudnn": CUDNN}, STILL_ATTENTION),
}
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
    "attention: cudnn": (f"{STILL_ATTENTION} {CUDNN}", STILL_ATTENTION),
    "rows from the host": ("--rows_on_device=never", "--rows_on_device=always"),
    "look-up by scatter": ("--model.lookup_gradient=scatter", "--model.lookup_gradient=summed"),
}
SETTINGS_CASE, TOY_SETTINGS_CASE = Case("small", 128, 128), Case("tiny", 4, 32)
# length, heads, width of a head and mask for the fused attention; length and width of states for the fused norm
CHECKED_ATTENTION = ((48, 4, 64, "documents"), (128, 4, 64, "padding"), (512, 12, 64, "documents"))
CHECKED_NORM = ((128, 256), (512, 768))
TOY_ATTENTION, TOY_NORM = ((32, 2, 16, "padding"), (48, 2, 16, "documents")), ((32, 48),)
TORCH_MODES = ("default", "reduce-overhead")  # of torch.compile; the second one replays CUDA graphs
FREE_BATCHES = (2048, 1024, 512)  # the largest first: JAX keeps its memory, and the others find room in it
MEMORY_SHARE = 0.6  # of the device, that a step may take: PyTorch is there as well
LEAST_CALLS = 4  # of a round, so that rows are read and steps are started while others run
AT_ONCE = 2  # programs that are compiled


class Scale(NamedTuple):
    """What --check makes small."""

    attention: tuple[tuple[int, int, int, str], ...]
    norm: tuple[tuple[int, int], ...]
    dtype: str  # of what is checked
    cases: dict[str, Case]
    settings_case: Case
    words: str
    host_words: str
    rounds: int
    steps: int  # of a round
    torch_modes: tuple[str, ...]
    free_batches: tuple[int, ...]


# -- trainings ---------------------------------------------------------------------------------------------------------


def config_of(case: Case, words: str) -> PretrainConfig:
    words = words.replace("{half}", str(max(1, case.batch // 2)))
    return step_config(case.size, case.batch, case.length, *words.split())


def dropouts(config: PretrainConfig) -> dict[str, float]:
    return {"dropout": config.model.dropout, "attention_dropout": config.model.attention_dropout}


def made(wanted: Iterable[tuple[Case, str]]) -> list[Training | Exception]:
    """The trainings of cases with words, compiled; or why this device or this electrax cannot do one."""

    def make(one: tuple[Case, str]) -> Training | Exception:
        try:
            training = Training(config_of(*one))
            training.compiled()
            return training
        except Exception as error:
            return error

    with ThreadPoolExecutor(AT_ONCE if jax.default_backend() == "gpu" else 1) as pool:
        return list(pool.map(make, wanted))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def run_calls(start: Callable[[], Any], calls: int) -> float:
    """The last loss; the host waits for it alone."""
    for _ in range(calls):
        loss = start()
    return float(loss)


def calls_of(training: Training, steps: int) -> tuple[Callable[[], float], int]:
    """What runs at least so many steps, in whole calls, and how many these are."""
    calls = max(LEAST_CALLS, -(-steps // training.steps_a_call))
    return functools.partial(run_calls, training.start, calls), calls * training.steps_a_call


def step_seconds(runs: Mapping[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each contestant in each round, from what runs some steps and how many."""
    only = {name: run for name, (run, _) in runs.items()}
    alternate(only, 1)  # warms up
    return {name: [v / runs[name][1] for v in values] for name, values in alternate(only, rounds).items()}


def needed_bytes(step: jax.stages.Compiled) -> int:
    """Of the device: the state, the rows and what is there while the step runs."""
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0


class TorchSide:
    """A step of PyTorch in a process of its own, so that neither framework needs the other's memory."""

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

    def run(self, steps: int) -> float:
        print(steps, file=self._process.stdin, flush=True)
        return float(self.answer())

    def close(self) -> None:
        """Once it returns the memory is free."""
        self._process.kill()
        self._process.communicate()


def serve_torch(case: Case, words: str, mode: str, device: str) -> None:
    """The other end of a TorchSide."""
    try:
        step = torch_step(config_of(case, words), device, True, mode)
        run_calls(step, 4)  # compiles; CUDA graphs are recorded after the first
    except Exception as error:
        print(f"> {reason(error)}", flush=True)
        return
    print("> ready", flush=True)
    for line in sys.stdin:
        print(f"> {run_calls(step, int(line))}", flush=True)


def torch_sides(case: Case, scale: Scale) -> dict[str, TorchSide]:
    """By mode of torch.compile."""
    if not find_spec("torch"):
        return {}
    words = f"{scale.words} {case.words}"
    return {f"torch, {mode or 'eager'}": TorchSide(case, words, mode) for mode in scale.torch_modes}


# -- parts -------------------------------------------------------------------------------------------------------------


def measure_checks(scale: Scale) -> dict[str, Any]:
    """How far the fused kernels are from plain; SystemExit where that is too far."""
    found: dict[str, Any] = {}
    for length, heads, width, kind in scale.attention:
        inputs = make_inputs(4, length, heads, width, scale.dtype)
        agreement = check(inputs, {kind: make_mask(kind, 4, length)}, ["fused"])
        found[f"attention, {length} x {heads} x {width}, {kind} mask"] = agreement[kind]
    for length, width in scale.norm:
        found[f"norm, {length} x {width}"] = check_norm(4, length, width, scale.dtype)
    for name, shares in found.items():
        print(f"{name:48}" + "   ".join(f"{what} {share:.1e}" for what, share in shares.items()), flush=True)
    return found


def measure_cases(scale: Scale, write_rows: Callable[[Any], None]) -> dict[str, Any]:
    result: dict[str, Any] = {"peak_flops": peak_flops(jax.devices()[0], "bfloat16"), "rows": {}}
    for name, case in scale.cases.items():
        try:
            result["rows"][name] = measure_case(name, case, scale, result["peak_flops"])
        except Exception as error:  # as where there is too little memory: the other cases are worth having
            result["rows"][name] = {**case._asdict(), "failed": reason(error)}
            print(f"{name:20}{reason(error)}", flush=True)
        write_rows(result)
        gc.collect()  # trainings that are gone give their memory back
    return result


class Found(NamedTuple):
    """Of a variant's trainings the quickest one."""

    rate: float  # tokens a second
    batch: int
    training: Training


def measure_case(name: str, case: Case, scale: Scale, peak: float) -> dict[str, Any]:
    """The variants against each other and against PyTorch, which gets the quickest one's batch."""
    row: dict[str, Any] = {**case._asdict(), "tried": {}, "failed": {}, "contestants": {}}
    chosen = find_quickest(case, scale, row["tried"])
    for variant in case.variants.keys() - chosen.keys():
        print(f"{name:20}{variant:34}not here: {row['tried'][variant]}", flush=True)
    if not chosen:
        return row
    best = max(chosen.values(), key=lambda found: found.rate)
    runs = {variant: calls_of(found.training, scale.steps) for variant, found in chosen.items()}
    seconds = against_torch(case._replace(batch=best.batch), runs, scale, row["failed"])
    for contestant, why in row["failed"].items():
        print(f"{name:20}{contestant:34}not here: {why}", flush=True)
    tokens = {contestant: chosen.get(contestant, best).batch * case.length for contestant in seconds}
    of_token = {contestant: [value / tokens[contestant] for value in values] for contestant, values in seconds.items()}
    for contestant, values in seconds.items():
        _, batch, training = chosen.get(contestant, best)
        words = f"{scale.words} {case.words} {case.variants.get(contestant, '')}"
        row["contestants"][contestant] = figures = {
            "batch": batch,
            **dropouts(config_of(case._replace(batch=batch), words)),
            "flops": training.flops,
            "seconds": spread(values),
            "tokens_per_second": spread([1 / value for value in of_token[contestant]]),
            "mfu": spread([training.flops / value / peak for value in values]),
            "ratio_to": {other: ratios(of_token, contestant, other) for other in seconds if other != contestant},
        }
        if contestant in chosen:
            figures |= {"steps_a_call": training.steps_a_call, "needed_bytes": needed_bytes(training.compiled())}
        print(
            f"{name:20}{batch:>6} x {case.length:<5}{contestant:34}"
            f"{figures['seconds']['median'] * 1e3:9.2f} ms{figures['tokens_per_second']['median']:>12,.0f} "
            f"tokens/s   MFU {figures['mfu']['median']:.1%}   "
            + "   ".join(f"{shown(ratio)} of {other}" for other, ratio in figures["ratio_to"].items()),
            flush=True,
        )
    return row


def against_torch(
    case: Case, runs: Mapping[str, tuple[Callable[[], Any], int]], scale: Scale, failed: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds a step of what runs, and of PyTorch, which takes as many steps a round; `failed` gets why it cannot."""
    steps, sides = max(count for _, count in runs.values()), torch_sides(case, scale)
    try:
        answers = {name: side.answer() for name, side in sides.items()}
        failed |= {name: answer for name, answer in answers.items() if answer != "ready"}
        ready = {
            name: (functools.partial(side.run, steps), steps) for name, side in sides.items() if name not in failed
        }
        return step_seconds({**runs, **ready}, scale.rounds)
    finally:
        for side in sides.values():
            side.close()


def find_quickest(case: Case, scale: Scale, tried: dict[str, dict[str, Any]]) -> dict[str, Found]:
    """The quickest training of each variant that has one. `tried` gets, by variant and batch, what each does, in tokens
    a second or in words."""
    wanted = [
        (variant, batch) for variant in case.variants for batch in ([case.batch] if case.batch else scale.free_batches)
    ]
    trainings = made(
        (case._replace(batch=batch), f"{scale.words} {case.words} {case.variants[variant]}")
        for variant, batch in wanted
    )
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    chosen: dict[str, Found] = {}
    for (variant, batch), training in zip(wanted, trainings, strict=True):
        try:
            if isinstance(training, Exception):
                raise training
            if limit and needed_bytes(training.compiled()) > MEMORY_SHARE * limit:
                raise MemoryError(f"needs {needed_bytes(training.compiled()):,} bytes")
            ((seconds,),) = step_seconds({"": calls_of(training, scale.steps)}, 1).values()
        except Exception as error:
            tried.setdefault(variant, {})[str(batch)] = reason(error)
            continue
        found = Found(batch * case.length / seconds, batch, training)
        tried.setdefault(variant, {})[str(batch)] = found.rate
        if variant not in chosen or found.rate > chosen[variant].rate:
            chosen[variant] = found
    return chosen


def measure_settings(
    scale: Scale, settings: dict[str, tuple[str, str]], write_rows: Callable[[Any], None]
) -> dict[str, Any]:
    """Each setting against its own base in alternation; one that this device or this electrax cannot do says why."""
    result: dict[str, Any] = {}
    trainings: dict[str, Training | Exception] = {}
    for place in range(0, len(settings), AT_ONCE):  # so that there are rows before all are compiled
        few = dict(itertools.islice(settings.items(), place, place + AT_ONCE))
        missing = list(dict.fromkeys(words for pair in few.values() for words in pair if words not in trainings))
        compiled = made((scale.settings_case, f"{scale.words} {words}") for words in missing)
        trainings |= zip(missing, compiled, strict=True)
        for name, (words, base) in few.items():
            pair = {"base": trainings[base], "setting": trainings[words]}
            result[name] = {"words": words, "base": base, **measure_setting(pair, scale)}
            if "failed" in result[name]:
                print(f"{name:24}not here: {result[name]['failed']}", flush=True)
            else:
                print(f"{name:24}{shown(result[name]['ratio'])} of {base or 'the default'}", flush=True)
            write_rows(result)
    return result


def measure_setting(pair: dict[str, Training | Exception], scale: Scale) -> dict[str, Any]:
    try:
        for training in pair.values():
            if isinstance(training, Exception):
                raise training
        seconds = step_seconds({side: calls_of(t, scale.steps) for side, t in pair.items()}, scale.rounds)
    except Exception as error:
        return {"failed": reason(error)}
    return {
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "ratio": ratios(seconds, "setting", "base"),
        "needed_bytes": {side: needed_bytes(training.compiled()) for side, training in pair.items()},
    }


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


def make_run(case: Case, words: str, workdir: str) -> Run:
    """A run as `electrax pretrain` puts it together, on random rows."""
    config = config_of(case, f"{words} --workdir={workdir}")
    mesh, corpus = mesh_for(config), RandomCorpus(case.length)
    task = make_task(config, VOCABULARY, SPECIAL, corpus)
    flops, due = task.flops(case.batch, case.length), (config.log.every, config.eval.every, config.checkpoint.every)
    return assemble(
        config,
        task,
        SimpleNamespace(sha256=""),
        mesh,
        example=task.train_batch(0),
        steps=config.steps,
        flops_per_step=flops,
        tokens_per_step=float(case.batch * case.length),
        eval_every=config.eval.every,
        save_every=config.checkpoint.every,
        steps_per_dispatch=choose_together(config.steps_per_dispatch, due, mesh.local_devices[0], flops),
        feed=make_feed(config, task, corpus, mesh),
    )


def measure_host(scale: Scale) -> dict[str, Any]:
    """Of the training loop between one log line and the next: the CPU time of its thread, as a share of the time, and
    the compilations after the first call. Waiting for the device takes none. Evaluation and saving are never due."""
    compiled: list[str] = []
    before: list[int] = []  # each call: compilations until then

    def listen(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    busy, wall, steps = [time.thread_time()], [], []
    with tempfile.TemporaryDirectory() as workdir:
        run = make_run(scale.settings_case, f"{scale.words} {scale.host_words}", workdir)

        def feed(step: int, count: int) -> Any:
            before.append(len(compiled))
            return run.feed(step, count)

        jax.monitoring.register_event_duration_secs_listener(listen)
        with contextlib.closing(dataclasses.replace(run, feed=feed).train()) as records:
            logs = (record.figures for record in records if record.kind == "log")
            most = min(run.eval_every, run.save_every) // run.config.log.every - 1
            for figures in itertools.islice(logs, min(1 + scale.rounds, most)):
                busy.append(time.thread_time())
                wall.append(figures["seconds"])
                steps.append(figures["steps"])
    late = len(compiled) - before[1]
    jax.jit(lambda x: x + 1).lower(np.zeros(3, np.float32)).compile()  # shows that the listener hears
    if len(compiled) == before[1] + late:
        raise SystemExit("JAX reported no compilation: its event has another name")
    windows = list(zip(np.diff(busy).tolist(), wall, steps, strict=True))[1:]  # the first one compiles
    host = spread([cpu / count for cpu, _, count in windows])
    share = spread([cpu / seconds for cpu, seconds, _ in windows])
    print(
        f"host {host['median'] * 1e3:.3f} ms a step, {shown(share, 4)} of it; {late} compilations after the first call"
    )
    return {
        "host_seconds": host,
        "step_seconds": spread([seconds / count for _, seconds, count in windows]),
        "share": share,
        "steps_a_call": run.steps_per_dispatch,
        "compilations_after_first_call": late,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("checks", "cases", "settings", "lookup", "host")
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
    use_flags()
    use_compilation_cache()
    if not options.check and jax.default_backend() != "gpu":
        print("benchmarks.accelerator: JAX found no GPU; --check runs every part small on the CPU", file=sys.stderr)
        sys.exit(2)
    cases = {name: CASES[name] for name in options.cases}
    scale = Scale(
        attention=CHECKED_ATTENTION,
        norm=CHECKED_NORM,
        dtype="bfloat16",
        cases=cases,
        settings_case=SETTINGS_CASE,
        words=WORDS,
        host_words="",
        rounds=options.rounds,
        steps=options.steps,
        torch_modes=TORCH_MODES,
        free_batches=FREE_BATCHES,
    )
    if options.check:
        scale = Scale(
            attention=TOY_ATTENTION,
            norm=TOY_NORM,
            dtype="float32",
            cases=TOY_CASES,
            settings_case=TOY_SETTINGS_CASE,
            words=f"{WORDS} {TOY_WORDS}",
            host_words="--log.every=4",
            rounds=1,
            steps=2,
            torch_modes=("",),
            free_batches=(8, 4),
        )
    more = [setting.partition("=") for setting in options.setting]
    settings = {name: SETTINGS[name] for name in options.only} | {name: (words, "") for name, _, words in more}
    results: dict[str, Any] = {}
    measure = {
        "checks": lambda: measure_checks(scale),
        "cases": lambda: measure_cases(scale, functools.partial(keep, "cases")),
        "settings": lambda: measure_settings(scale, settings, functools.partial(keep, "settings")),
        "lookup": lambda: measure_lookup(scale),
        "host": lambda: measure_host(scale),
    }

    def keep(part: str, rows: Any) -> None:
        """What is there, should a later row fail or the time be over."""
        results[part] = rows
        if not options.check:
            there = versions(*filter(find_spec, ("torch", "transformers")))
            write("accelerator.json", environment(there) | {"xla_flags": os.environ["XLA_FLAGS"]} | results)

    for part in options.parts:
        print(f"-- {part}", flush=True)
        keep(part, measure[part]())
        gc.collect()
    if options.check:
        print("every part runs; nothing was written")


if __name__ == "__main__":
    main()
