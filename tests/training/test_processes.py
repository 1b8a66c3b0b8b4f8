"""Several processes as one run, started on this machine as a person would start them on several."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from electrax.config import UserError
from electrax.experiment.run import load_params
from electrax.training.processes import ProcessConfig, agreed, from_environment, join, together

STEPS, HEARTBEAT = 20, 5
CONFIG = f"""
steps = {STEPS}
batch_size = 8
[model]
size = "tiny"
layers = 1
width = 16
heads = 2
embedding_width = 8
max_length = 32
[generator]
width = 8
heads = 2
layers = 1
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[eval]
every = 10
[checkpoint]
every = 10
[log]
every = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    made = tmp_path_factory.mktemp("processes")
    (made / "config.toml").write_text(CONFIG + f'[data]\npath = "{corpus.directory}"\nmax_length = 32\n')
    return made


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def start(folder, name, count, *options, devices=1, own=None, environment=None):
    """The processes of one run; `own(i)` are the options of process i alone, and `environment(i)` its variables."""
    command = [sys.executable, "-m", "electrax", "pretrain", str(folder / "config.toml")]
    command += ["--workdir", str(folder / name), *options]
    place = ["--coordinator", f"localhost:{free_port()}", "--num_processes", str(count)]
    started = []
    for i in range(count):
        variables = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        variables |= environment(i) if environment else {}
        alone = count == 1 or environment
        beat = ["--heartbeat_seconds", str(HEARTBEAT)]
        where = [] if alone else [*place, "--process_id", str(i), *beat]
        started.append(
            subprocess.Popen(
                [*command, *where, *(own(i) if own else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=variables,
                start_new_session=True,
            )
        )
    return started


def finish(processes, status=0):
    """What each of them printed."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(said)
    return said


def losses(workdir) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def weights(workdir) -> dict[str, str]:
    """The bytes of every parameter of the last checkpoint."""
    step, params = load_params(workdir)
    assert step == STEPS
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.fixture(scope="module")
def one(folder):
    finish(start(folder, "one", 1))
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder):
    """(work directory, what each process printed)."""
    return folder / "two", finish(start(folder, "two", 2))


def test_two_processes_train_as_one(one, two):
    found, wanted = losses(two[0]), losses(one)
    assert list(found) == list(wanted) == list(range(1, STEPS + 1))
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-5)
    evaluated = [json.loads((workdir / "results.json").read_text()) for workdir in (two[0], one)]
    assert evaluated[0]["rtd_loss"] == pytest.approx(evaluated[1]["rtd_loss"], rel=1e-5)
    assert evaluated[0]["rtd_auc"] == pytest.approx(evaluated[1]["rtd_auc"], rel=1e-3)


def test_only_the_first_process_writes_and_shows(two):
    first, second = two[1]
    assert "held out" in first
    assert "step" not in second
    assert not list(two[0].parent.glob("*.partial"))


def test_two_processes_give_the_same_bits_again_however_they_find_each_other(folder, two):
    port = free_port()

    def slurm(i):
        step = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        return step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "JAX_COORDINATOR_PORT": str(port)}

    finish(start(folder, "again", 2, environment=slurm))
    assert losses(folder / "again") == losses(two[0])
    assert weights(folder / "again") == weights(two[0])


def test_four_processes_on_a_divided_mesh_train_as_one(folder, one):
    finish(start(folder, "four", 4, "--mesh.fsdp", "2", devices=2))
    found = losses(folder / "four")
    assert list(found.values()) == pytest.approx(list(losses(one).values()), rel=1e-5)


def test_a_stop_that_one_process_is_told_saves_all_and_one_process_goes_on(folder, one):
    processes = start(folder, "stopped", 2, "--steps", "3000", "--optimizer.schedule", "joined")
    path, until = folder / "stopped" / "metrics.jsonl", time.monotonic() + 200
    while not (path.is_file() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes, 130)
    reached = max(int(p.parent.name) for p in (folder / "stopped").glob("checkpoints/*/checksums.json"))
    assert f"saved step {reached} in " in first
    finish(start(folder, "stopped", 1, "--steps", str(reached + 1), "--optimizer.schedule", "joined"))
    assert list(losses(folder / "stopped")) == list(range(1, reached + 2))


def test_when_a_process_dies_the_others_end_and_the_same_command_goes_on(folder, two):
    processes = start(folder, "killed", 2)
    workdir, until = folder / "killed", time.monotonic() + 200
    while not list(workdir.glob("checkpoints/*/checksums.json")) and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    said, _ = [process.communicate(timeout=200)[0] for process in processes]
    if processes[0].returncode:  # it may have been done
        assert time.monotonic() - killed < 6 * HEARTBEAT  # a busy machine is late
        assert "another task died" in said
    finish(start(folder, "killed", 2))
    assert weights(workdir) == weights(two[0])


def test_what_is_wrong_in_one_process_ends_all_with_its_message(folder, corpus):
    paths = [corpus.directory, folder / "nowhere"]
    said = finish(start(folder, "wrong", 2, own=lambda i: ["--data.path", str(paths[i])]), 2)
    assert "electrax: process 1: " in said[0]
    assert all("nowhere" in text and "Traceback" not in text for text in said)
    assert not (folder / "wrong").exists()


# -- one process -------------------------------------------------------------------------------------------------------


def test_a_process_by_itself_joins_no_other():
    assert not join(ProcessConfig())
    assert not join(ProcessConfig(num_processes=1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ProcessConfig(num_processes=2), "coordinator is missing; expected HOST:PORT of process 0"),
        (ProcessConfig("host:1"), "num_processes and process_id missing"),
        (ProcessConfig("host:1", num_processes=2), "process_id missing"),
    ],
)
def test_a_place_that_is_not_whole_is_an_error(config, message):
    with pytest.raises(UserError, match=message):
        join(config)


def test_a_place_beyond_the_last_process_is_an_error():
    with pytest.raises(UserError, match="process_id 2 must be below num_processes, 2"):
        ProcessConfig("host:1", 2, 2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("a:1", 4, 3)),
        ({"COORDINATOR_ADDRESS": "a", "COORDINATOR_PORT": "7", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}, ("a:7", 2, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, ("", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JOB_COMPLETION_INDEX": "5"}, ("a:1", 0, 5)),
    ],
)
def test_the_environment_says_where_a_process_belongs(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = from_environment(ProcessConfig())
    assert (found.coordinator, found.num_processes, max(found.process_id, 0)) == expected


@pytest.mark.parametrize(
    "variables", [{"NUM_PROCESSES": "4"}, {"PROCESS_ID": "2", "NUM_PROCESSES": "4"}, {"SLURM_NTASKS": "8"}]
)
def test_variables_that_others_use_too_make_no_run_of_several_processes(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not join(ProcessConfig())


def test_an_option_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert from_environment(ProcessConfig(process_id=1)).process_id == 1


def test_a_variable_that_is_no_number_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=first: expected a whole number"):
        from_environment(ProcessConfig())


def test_alone_a_process_agrees_with_itself():
    assert agreed(lambda a, b: [a, b], 1, "x") == [1, "x"]
    with pytest.raises(UserError, match="mine"), together():
        raise UserError("mine")
