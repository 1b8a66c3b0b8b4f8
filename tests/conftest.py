"""Strict settings for every test: shapes are checked, rank promotion raises, eight virtual devices."""

import os
import pathlib

import jax
from jaxtyping import install_import_hook

install_import_hook("electrax", "beartype.beartype").__enter__()

CACHE = pathlib.Path(os.environ.get("ELECTRAX_TEST_CACHE", pathlib.Path(__file__).parent.parent / ".jax_cache"))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
