"""Strict settings for every test: shapes are checked, rank promotion raises, eight virtual devices."""

import os
import pathlib

# compiling is most of what tests do; the least optimisation and the older emitter of fusions give the same numbers in
# less than half the time, in child processes too
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# as many workers as cores leave nothing for a program's parts to be compiled on at once
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# eight devices on a busy machine of two cores may wait for each other longer than the 40 s after which XLA aborts
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=1200"

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("electrax", "beartype.beartype").__enter__()

CACHE = pathlib.Path(os.environ.get("ELECTRAX_TEST_CACHE", pathlib.Path(__file__).parent.parent / ".jax_cache"))

os.environ["XDG_CACHE_HOME"] = str(CACHE / "xdg")  # tests, and the processes they start, leave the user's cache alone

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# a file is one worker's work; the longest begin first, so that none is left alone at the end
LONGEST = ("test_readme", "test_configs_shipped", "test_processes", "test_resume", "test_state", "test_lockstep")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
