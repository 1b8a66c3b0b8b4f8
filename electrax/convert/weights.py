"""Tensors in files: those beside the config.json of Transformers, and electrax's trees of parameters."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from electrax.config import UserError
from electrax.convert.msgpack import read_msgpack
from electrax.convert.safetensors import parse_json, read_checked, read_safetensors, unique, write_safetensors
from electrax.data.outside import is_file_name, read_bytes
from electrax.tasks.base import Params

TORCH_FILE = "pytorch_model.bin"


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a directory by their names in torch; float16 and bfloat16 as float32, others as they are.

    From safetensors, torch's checkpoint or Flax's msgpack, in this order; of torch's only where torch is installed.
    Raises UserError where there is none of them, or a damaged one."""
    found = [file for file in READERS if (path / file).is_file() or (path / f"{file}.index.json").is_file()]
    if not found:
        raise UserError(f"{path}: holds no weights; expected one of {', '.join(READERS)}")
    if len(found) > 1 and found[0] == TORCH_FILE and importlib.util.find_spec("torch") is None:
        found.pop(0)
    file, read = path / found[0], READERS[found[0]]
    tensors = read(file) if file.is_file() else _read_shards(path / f"{found[0]}.index.json", read)
    try:
        return unique((_new_name(name), array) for name, array in tensors.items())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _new_name(name: str) -> str:
    """BERT's oldest checkpoints name the parameters of a norm as TensorFlow does."""
    for old, new in {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _read_shards(index: pathlib.Path, read: Callable[[pathlib.Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors of all files that an index names."""
    files = parse_json(index, read_bytes(index)).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index}: expected a weight_map of tensors' names to files")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(files.values())):
        if not is_file_name(file):
            raise UserError(f"{index}: names the shard {file!r}; expected a file beside it")
        if not os.path.isfile(index.parent / file):
            raise UserError(f"{index}: the shard {file!r} is missing")
        found = read(index.parent / file)
        lacking = [name for name in files if files[name] == file and name not in found]
        twice = sorted(tensors.keys() & found)
        if lacking:
            raise UserError(f"{index}: the shard {file!r} lacks {lacking[0]!r}")
        if twice:
            raise UserError(f"{index}: {twice[0]!r} is in the shard {file!r} and in another")
        tensors |= found
    return tensors


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: only PyTorch reads it, which is not installed; expected model.safetensors") from None
    version = [int(part) for part in re.findall(r"\d+", torch.__version__)[:2]]
    if version < [2, 6]:
        raise UserError(f"{path}: torch {torch.__version__} can be made to run code by a file (CVE-2025-32434); "
                        "expected torch 2.6 or newer, or model.safetensors")  # fmt: skip
    size, arrays = path.stat().st_size, {}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in tensors.items():
            if not isinstance(name, str) or tensor.nelement() * tensor.element_size() > size:
                raise ValueError(f"{name!r} is not a tensor of this file")
            is_half = tensor.dtype in (torch.float16, torch.bfloat16)
            arrays[name] = (tensor.float() if is_half else tensor).detach().numpy()
    except Exception as error:  # of a damaged file, whatever the parsers of torch happen to raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path}: expected a checkpoint of tensors alone ({type(error).__name__}: {reason})") from None
    return arrays


READERS = {"model.safetensors": read_safetensors, TORCH_FILE: _read_torch, "flax_model.msgpack": read_msgpack}


# -- trees of parameters -----------------------------------------------------------------------------------------------


def write_tree(
    path: pathlib.Path,
    tree: Params,
    metadata: Mapping[str, str] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """A tree of arrays as one safetensors file with a checksum, by names with slashes; all floats as `dtype`."""
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            arrays[name] = array.astype(jnp.dtype(dtype), copy=False)
    write_safetensors(path, arrays, metadata, checksum=True)


def read_tree(path: pathlib.Path) -> tuple[Params, dict[str, str]]:
    """The tree that `write_tree` wrote, bfloat16 as float32, and its metadata. Raises UserError where a bit of the file
    has changed."""
    arrays, metadata = read_checked(path)
    return unflatten_dict(arrays, sep="/"), metadata
