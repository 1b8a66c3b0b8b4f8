"""What kills, flipped bytes and cut files do to a run: its last weights are those of one that nothing disturbed, or the
command refuses and names the damaged file.

    python -m benchmarks.faults [--kills 200] [--damages 200] [--seed 0] [--workdir DIR] [--check]

Kills: kill -9 at a random moment of a command, again and again, until a last call runs to the end; of pretraining and
fine-tuning in one process, and of one of the two processes of a pretraining. Damages: of a half-finished run that then
goes on a random bit of a random file is flipped, or the file cut: in the newest checkpoint, the corpus or beside them.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.report import RESULTS, environment, write
from electrax import cli
from electrax.config import UserError
from electrax.experiment.run import load_params
from electrax.report.common import show_table

STEPS, HEARTBEAT = 60, 4
MODEL = """
[model]
size = "tiny"
layers = 1
width = 16
heads = 2
feed_forward = 32
embedding_width = 8
max_length = 32
[log]
every = 10
[eval]
every = 30
[checkpoint]
every = 10
keep = 10
"""
PRETRAIN = f"""
steps = {STEPS}
batch_size = 8
[generator]
width = 8
heads = 2
layers = 1
[optimizer]
warmup_steps = 5
"""
FINETUNE = f"""
task = "classify"
steps = {STEPS}
batch_size = 8
"""
Weights = dict[str, bytes]


def prepare(folder: pathlib.Path, chance: random.Random) -> None:
    """A small corpus, a small CSV, and the configs of a pretraining and a fine-tuning on them."""
    words = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in "klmnrst"]
    sentence = lambda: " ".join(chance.choices(words, k=chance.randint(4, 9)))  # noqa: E731
    (folder / "text.txt").write_text("\n\n".join("\n".join(sentence() for _ in range(4)) for _ in range(150)))
    rows = [f"{sentence()},{'good' if i % 2 else 'bad'}" for i in range(200)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    corpus = folder / "corpus"
    sizes = ["--vocab_size", "120", "--max_length", "32", "--workers", "1", "--holdout", "0.1"]
    cli.run(["prepare", str(folder / "text.txt"), "--out", str(corpus), *sizes])
    (folder / "pretrain.toml").write_text(PRETRAIN + MODEL + f'[data]\npath = "{corpus}"\nmax_length = 32\n')
    data = f'[data]\npath = "{folder / "rows.csv"}"\ntext = ["text"]\nlabel = "label"\nvocab_size = 120\n'
    (folder / "finetune.toml").write_text(FINETUNE + MODEL + data + "max_length = 32\n")


def weights(workdir: pathlib.Path) -> Weights:
    """Every parameter after the last step."""
    step, params = load_params(workdir)
    if step != STEPS:
        raise ValueError(f"{workdir}: ended at step {step}")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def start(folder: pathlib.Path, kind: str, workdir: pathlib.Path, processes: int = 1) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "electrax", kind, str(folder / f"{kind}.toml"), "--workdir", str(workdir)]
    if processes == 1:
        where = [[]]
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--num_processes", str(processes)]
        where = [[*place, "--process_id", str(i), "--heartbeat_seconds", str(HEARTBEAT)] for i in range(processes)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return [subprocess.Popen([*command, *own], **options) for own in where]


def kill_often(
    folder: pathlib.Path, kind: str, processes: int, kills: int, expected: Weights, chance: random.Random
) -> dict[str, int]:
    """Kills runs until there were so many, up to ten of one run, each of which then ends in peace."""
    counts = {"kills": 0, "runs": 0, "too late": 0, "other weights": 0, "failed to go on": 0}
    seconds = None  # of a whole call
    while counts["kills"] < kills:
        workdir = folder / f"{kind}-{processes}-{counts['runs']}"
        for _ in range(min(10, kills - counts["kills"])):
            began = time.monotonic()
            if seconds is None:  # the first call of all is only timed
                calm = start(folder, kind, folder / f"timed-{kind}-{processes}", processes)
                if max(abs(process.wait()) for process in calm):
                    raise SystemExit(f"an undisturbed {kind} in {processes} processes failed")
                seconds = time.monotonic() - began
            running = start(folder, kind, workdir, processes)
            time.sleep(chance.uniform(0.2, 1.0) * seconds)
            victim = chance.choice(running)
            if victim.poll() is None:
                os.killpg(victim.pid, signal.SIGKILL)
                counts["kills"] += 1
            else:
                counts["too late"] += 1
            for process in running:
                process.wait()
            if (workdir / "results.json").is_file():
                break
        ended = [process.wait() for process in start(folder, kind, workdir, processes)]
        counts["runs"] += 1
        if any(ended):
            counts["failed to go on"] += 1
        elif weights(workdir) != expected:
            counts["other weights"] += 1
        else:
            shutil.rmtree(workdir)
    return counts


def damage(path: pathlib.Path, chance: random.Random) -> str:
    """Flips a bit of one byte of a file, or cuts it; in words what was done."""
    content = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        size = chance.randrange(len(content))
        path.write_bytes(content[:size])
        return f"cut to {size} of {len(content)} bytes"
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place}"


def quietly(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        from electrax.report import common

        shown, common.console.quiet = common.console.quiet, True
        try:
            cli.run(arguments)
        finally:
            common.console.quiet = shown


def damage_often(
    folder: pathlib.Path, kind: str, damages: int, expected: Weights, chance: random.Random, say: Callable[[str], None]
) -> dict[str, int]:
    """Continues copies of a run that ended half-way, one file of each of which is damaged."""
    counts = {"damages": 0, "same weights": 0, "refused, naming the file": 0, "refused otherwise": 0}
    counts |= {"other weights": 0, "crashed": 0}
    reference = folder / f"reference-{kind}"
    half = folder / f"half-{kind}"
    shutil.copytree(reference, half)
    for path in half.glob("checkpoints/*"):
        if path.name.isdecimal() and int(path.name) > STEPS // 2:
            shutil.rmtree(path)
    (half / "results.json").unlink()
    whole = folder / "whole"
    shutil.copytree(folder / "corpus", whole, dirs_exist_ok=True)
    while counts["damages"] < damages:
        workdir = folder / "damaged"
        shutil.copytree(half, workdir)
        newest = workdir / "checkpoints" / str(STEPS // 2)
        groups = [list(newest.rglob("*")), list(workdir.glob("*"))]
        groups += [list((folder / "corpus").iterdir())] if kind == "pretrain" else []
        files = [p for p in chance.choice(groups) if p.is_file() and p.stat().st_size and "tfevents" not in p.name]
        path = chance.choice(sorted(files))
        what = f"{path.relative_to(folder)}: {damage(path, chance)}"
        counts["damages"] += 1
        try:
            quietly([kind, str(folder / f"{kind}.toml"), "--workdir", str(workdir)])
            same = weights(workdir) == expected
            counts["same weights" if same else "other weights"] += 1
            if not same:
                say(f"OTHER WEIGHTS after {what}")
        except UserError as error:
            named = path.name in str(error)
            counts["refused, naming the file" if named else "refused otherwise"] += 1
            if not named:
                say(f"{what}: {error}")
        except Exception as error:
            counts["crashed"] += 1
            say(f"CRASHED after {what}: {type(error).__name__}: {error}")
        shutil.rmtree(workdir)
        shutil.rmtree(folder / "corpus")
        shutil.copytree(whole, folder / "corpus")
    return counts


def campaign(
    folder: pathlib.Path, kills: int, damages: int, seed: int, only: str = ""
) -> Iterator[tuple[str, dict[str, int]]]:
    """What each kind of fault did, as it is known; with `only` those whose names have it. Half of the kills meet a
    pretraining in one process, a quarter each a fine-tuning and a pretraining in two; two thirds of the damages a
    pretraining."""
    chance, expected = random.Random(seed), {}
    prepare(folder, chance)
    for kind in ("pretrain", "finetune"):
        quietly([kind, str(folder / f"{kind}.toml"), "--workdir", str(folder / f"reference-{kind}")])
        expected[kind] = weights(folder / f"reference-{kind}")
    for kind, count in (("pretrain", damages - damages // 3), ("finetune", damages // 3)):
        if only in f"damage, {kind}":
            yield f"damage, {kind}", damage_often(folder, kind, count, expected[kind], chance, print)
    two = folder / "two"
    if kills:
        [process.wait() for process in start(folder, "pretrain", two, 2)]
        expected["two"] = weights(two)
    plan = (("pretrain", 1, kills - 2 * (kills // 4)), ("finetune", 1, kills // 4), ("pretrain", 2, kills // 4))
    for kind, processes, count in plan:
        name = f"kill -9, {kind} in {processes} process{'es' if processes > 1 else ''}"
        if not count or only not in name:
            continue
        wanted = expected["two" if processes == 2 else kind]
        yield name, kill_often(folder, kind, processes, count, wanted, chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--only", default="", help='kinds of faults whose names have this, as "2 processes"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", default="")
    parser.add_argument("--check", action="store_true", help="keep no results")
    arguments = parser.parse_args()
    cli.use_compilation_cache()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.workdir or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        began, results = time.monotonic(), {}
        if arguments.only and (RESULTS / "faults.json").is_file():  # the other kinds' are kept
            results = json.loads((RESULTS / "faults.json").read_text())["results"]
        for name, counts in campaign(
            folder, *(getattr(arguments, name) for name in ("kills", "damages", "seed", "only"))
        ):
            results[name] = counts
            show_table(name, list(counts), [list(map(str, counts.values()))])
            sys.stdout.flush()
            if not arguments.check:
                passed = time.monotonic() - began
                write("faults.json", {"environment": environment(), "seconds": passed, "results": results})
    bad = ("other weights", "crashed", "failed to go on", "refused otherwise")
    if any(counts.get(name) for counts in results.values() for name in bad):
        sys.exit("not every run ended as it should")


if __name__ == "__main__":
    main()
