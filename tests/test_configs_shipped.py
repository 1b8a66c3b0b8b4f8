"""Every TOML file under configs/ is a runnable experiment that is what its header says."""

import functools
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from electrax.config import load
from electrax.experiment.pretrain import PretrainConfig, make_task

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
PRETRAIN = sorted(CONFIGS.glob("pretrain/*.toml"))
SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}

ids = pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)


def header(path):
    """The comment above the first key."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


@functools.cache
def parameters(path):
    """Parameters by tower, with shapes alone."""
    config = load(PretrainConfig, path, ["--workdir", "runs/any"])  # the others leave it to the command line
    task = make_task(config, config.data.vocab_size, SPECIAL_IDS, None)
    batch = {"ids": np.zeros((1, config.data.max_length), np.int32)}
    tree = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in tree.items()}


def test_there_are_shipped_configs():
    assert "tiny" in [path.stem for path in PRETRAIN]


@ids
def test_a_shipped_config_loads_and_builds_its_towers(path):
    assert {"embeddings", "generator"} <= set(parameters(path))


@ids
def test_a_shipped_config_says_in_its_header_how_to_run_it(path):
    assert re.search(rf"electrax pretrain (configs/pretrain/)?{re.escape(path.stem)}(\.toml)?(?!\S)", header(path))


@ids
def test_a_shipped_config_has_the_parameters_its_header_states(path):
    """ "12,345 parameters" is exact and "13.5 M parameters" is rounded; either is of all parts or of one of them, or
    of embeddings and discriminator, the part that is fine-tuned."""
    stated = re.findall(r"(\d[\d,.]*)( ?M| million)? parameters", header(path))
    if not stated:
        return
    sizes = parameters(path)
    kept = sizes["embeddings"] + sizes.get("discriminator", 0)
    real = {*sizes.values(), sum(sizes.values()), kept}
    for digits, millions in stated:
        digits = digits.replace(",", "")
        decimals = len(digits.partition(".")[2])
        possible = {round(size / 1e6, decimals) for size in real} if millions else real
        assert float(digits) in possible, f"{digits}{millions} is none of {sorted(real)}"
