import os
import subprocess
import sys

import pytest

from electrax.config import UserError, build
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import plan

MODEL = {"size": "tiny", "layers": 1, "width": 32, "heads": 2, "embedding_width": 16, "max_length": 32}


def config(**changes):
    values = {"steps": 10, "batch_size": 16, "workdir": "nowhere", "dry_run": True, "model": MODEL}
    values |= {"data": {"path": "not/there", "vocab_size": 128, "max_length": 32}}
    return build(PretrainConfig, values | changes, "the test")


def test_a_plan_counts_the_bytes_of_a_device_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan(config(mesh={"data": 2, "fsdp": 4}))
    assert found.mesh == (2, 4, 1)
    assert found.microbatch == 2
    assert found.batch == 2 * 32 * 2  # two rows of 32 tokens in uint16
    whole = plan(config(mesh={"data": 8}))
    assert whole.parameters > 3.5 * found.parameters  # norms and biases are on every device
    assert whole.optimizer == 2 * whole.parameters + 2 * 4  # two moments and two counts
    assert found.activations > 0
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_divide_names_the_next_one_that_does():
    with pytest.raises(UserError, match="batch_size 12 does not divide over 8 devices; the next one that does is 16"):
        plan(config(batch_size=12, mesh={"data": 8}))


def test_the_command_plans_for_devices_that_are_not_there(tmp_path):
    options = ["--workdir", str(tmp_path / "run"), "--data.path", "nothing", "--dry_run", "--mesh.data", "16"]
    small = ["--model.layers", "1", "--data.vocab_size", "128", "--batch_size", "32"]
    found = subprocess.run(
        [sys.executable, "-m", "electrax", "pretrain", "tiny", *options, *small],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert "16 x imagined devices, compiled for CPUs, mesh data x fsdp x model 16x1x1" in found.stdout
    assert "all-reduce of 16" in found.stdout
    assert not (tmp_path / "run").exists()
