"""A short form of benchmarks/faults.py. Kills are in training/test_resume.py and training/test_processes.py."""

import os
import pathlib
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parent.parent


def test_damages_change_no_weights_in_silence(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "0", "--damages", "8", "--check"]
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
    for part in ("damage, pretrain", "damage, finetune"):
        assert part in found.stdout
