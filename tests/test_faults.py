"""A short form of benchmarks/faults.py: kills and damages never change what a run ends with."""

import os
import pathlib
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parent.parent


def test_kills_and_damages_change_no_weights_in_silence(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "4", "--damages", "18", "--check"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    found = subprocess.run(
        [*command, "--workdir", str(tmp_path / "faults")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for part in ("damage, pretrain", "damage, finetune", "kill -9, pretrain in 1 process", "pretrain in 2 processes"):
        assert part in found.stdout
