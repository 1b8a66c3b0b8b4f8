"""A run that was ended at any moment and started again gives the bits of one that was not."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from electrax.config import build, to_toml
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import PretrainConfig, read_config
from electrax.experiment.pretrain import make_task, set_up
from electrax.training.checkpoint import restore_newest
from electrax.training.optim import make_optimizer
from electrax.training.state import abstract_state
from tests.fixtures.compilations import compilations

STEPS = 120
LOGGED = list(range(5, STEPS + 1, 5))
EVALUATED = [40, 80, 120]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Where the runs are kept, with their one config."""
    folder = tmp_path_factory.mktemp("runs")
    every = {"checkpoint": {"every": 10}, "eval": {"every": 40, "rows": 8}, "log": {"every": 5}}
    config = build(PretrainConfig, tiny.values(workdir="any", **every), "the test")
    (folder / "config.toml").write_text(to_toml(dataclasses.replace(config, steps=STEPS)))
    return folder


def start(folder, name, *options, devices=1, xla_flags=None):
    """The command, in a process of its own."""
    environment = os.environ | ({} if xla_flags is None else {"XLA_FLAGS": xla_flags})
    environment |= {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [
        sys.executable,
        "-m",
        "electrax",
        "pretrain",
        str(folder / "config.toml"),
        "--workdir",
        str(folder / name),
        *options,
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process, status=0):
    """What the process printed."""
    output, _ = process.communicate(timeout=200)
    assert process.returncode == status, output
    return output


def wait_for(condition, process):
    until = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.005)


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(workdir):
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


def last_checkpoint(workdir):
    """(step, every array of the state by path)."""
    config, tokenizer = read_config(workdir), Tokenizer.load(workdir)
    task = make_task(config, tokenizer.vocab_size, tokenizer.special_ids, None)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "model"))
    example = {"ids": np.zeros((8, 32), np.uint16)}
    abstract = abstract_state(task, make_optimizer(config.optimizer, STEPS), example, mesh)
    step, state = restore_newest(pathlib.Path(workdir) / "checkpoints", abstract)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return step, {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same_end(workdir, other):
    (step, state), (other_step, other_state) = last_checkpoint(workdir), last_checkpoint(other)
    assert step == other_step == STEPS
    assert state.keys() == other_state.keys()
    assert len(state) > 100
    for name, leaf in state.items():
        assert leaf.tobytes() == other_state[name].tobytes(), name
    assert (workdir / "results.json").read_text() == (other / "results.json").read_text()


@pytest.fixture(scope="module")
def straight(folder):
    """A run that nothing disturbed."""
    finish(start(folder, "straight"))
    return folder / "straight"


@pytest.fixture(scope="module")
def terminated(folder, straight):
    """(a copy of a run that SIGTERM ended, its work directory, what it printed)."""
    process = start(folder, "terminated")
    wait_for(lambda: len(lines(folder / "terminated")) > 4, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 130)
    shutil.copytree(folder / "terminated", folder / "copy")
    return folder / "copy", folder / "terminated", output


def test_an_undisturbed_run_logs_evaluates_and_learns(straight):
    assert list(losses(straight)) == LOGGED
    assert [line["step"] for line in lines(straight) if "eval_loss" in line] == EVALUATED
    assert losses(straight)[STEPS] < losses(straight)[5]


def test_a_run_killed_at_any_moment_and_repeated_gives_the_same_bits(folder, straight):
    workdir, moment = folder / "killed", random.uniform(0, 0.6)
    process = start(folder, "killed")
    wait_for(lambda: list(workdir.glob("checkpoints/*/checksums.json")), process)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it had ended {moment} s after the first checkpoint"
    reached = lines(workdir)[-1]["step"]
    output = finish(start(folder, "killed"))
    assert "(continued)" in output, f"killed {moment} s after the first checkpoint, at about step {reached}"
    assert_same_end(workdir, straight)
    assert [line["step"] for line in lines(workdir) if "loss" in line] == LOGGED
    assert [line["step"] for line in lines(workdir) if "eval_loss" in line] == EVALUATED
    assert losses(workdir) == losses(straight)
    seconds = [line["seconds"] for line in lines(workdir) if "loss" in line]
    assert seconds == sorted(seconds)


def test_sigterm_saves_and_says_how_to_go_on(folder, terminated):
    copy, workdir, output = terminated
    step, _ = last_checkpoint(copy)
    assert 10 < step < STEPS
    assert (
        f"saved step {step} in {workdir}; to continue: electrax pretrain {folder / 'config.toml'} --workdir" in output
    )
    assert lines(copy)[-1]["step"] == step
    assert not (copy / "results.json").exists()
    assert "Traceback" not in output


def test_a_run_ended_by_sigterm_and_repeated_gives_the_same_bits(folder, straight, terminated):
    _, workdir, _ = terminated
    output = finish(start(folder, "terminated"))
    assert f"{max(p for p in losses(terminated[0]))} to {STEPS} (continued)" in output
    assert_same_end(workdir, straight)
    logged = [line["step"] for line in lines(workdir) if "loss" in line]
    assert logged == sorted(set(logged))
    assert set(LOGGED) <= set(logged)


def test_a_run_continued_on_two_devices_sees_the_same_batches(folder, straight, terminated):
    copy, _, _ = terminated
    before = max(losses(copy))
    finish(start(folder, "copy", devices=2))
    first = next(step for step in LOGGED if step - 5 >= before)  # a whole window after the stop
    assert losses(copy)[first] == pytest.approx(losses(straight)[first], rel=1e-4)
    others = [loss for step, loss in losses(straight).items() if step != first]
    assert min(abs(loss / losses(straight)[first] - 1) for loss in others) > 1e-4  # other batches would be noticed


def test_the_finished_run_repeated_evaluates_again_and_changes_nothing(folder, straight):
    before = lines(straight)
    results = (straight / "results.json").read_text()
    finish(start(folder, "straight"))
    assert lines(straight) == before
    assert (straight / "results.json").read_text() == results


def test_nothing_compiles_late_where_some_steps_are_taken_one_by_one(tiny, tmp_path):
    every = {"checkpoint": {"every": 4}, "eval": {"every": 4, "rows": 8}, "log": {"every": 4}}
    values = tiny.values(workdir=str(tmp_path), steps=5, steps_per_dispatch=2, **every)
    run = set_up(build(PretrainConfig, values, "the test"))
    run.memory()
    counts = {}
    with compilations() as seconds:
        for record in run.train():
            counts[record.step] = len(seconds)
    run.checkpoints.close()
    assert set(counts) == {4, 5} and counts[4] == counts[5]


def test_steps_in_one_dispatch_give_the_bits_of_single_ones(folder):
    # with the emitter of fusions that the other tests do without, a loop rounds as its body alone does
    flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    small = ["--steps=12", "--log.every=3", "--model.layers=1"]
    for name, together in (("single", "1"), ("together", "3")):
        finish(start(folder, name, *small, "--steps_per_dispatch", together, xla_flags=flags))
    (step, state), (other_step, other_state) = last_checkpoint(folder / "single"), last_checkpoint(folder / "together")
    assert step == other_step == 12
    for name, leaf in state.items():
        assert leaf.tobytes() == other_state[name].tobytes(), name
    assert losses(folder / "single") == losses(folder / "together")
