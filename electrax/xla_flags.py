"""Flags of the XLA compiler that the commands set before JAX starts."""

import os

# The scheduler that lets the exchange of gradients overlap with computing is what NVIDIA ships with JAX. Every build of
# XLA knows the flag. None is set for a CPU: benchmarks/xla_flags.py is there to find one that pays.
FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)


def use_flags() -> None:
    """Puts them before the user's own XLA_FLAGS, which therefore win. Must come before JAX's first computation."""
    own = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag not in own), *own])
