"""TensorFlow checkpoints of Google's ELECTRA and BERT."""

import glob
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from electrax.config import UserError
from electrax.convert.bundle import read_bundle
from electrax.convert.config_json import DROPOUTS, FIXED, read_json

# what may lie beside a checkpoint and say what its variables do not, the first that is there
CONFIG_FILES = ("bert_config.json", "electra_config.json", "config.json")
TOLD = ("num_attention_heads", *FIXED, *DROPOUTS)
# variables that training needs, and no model
NOT_NEEDED = (
    (r".*/(adam_[mv]|lamb_[mv]|\w*(Adam|LAMB|Momentum)\w*)", "an optimizer slot"),
    (r"(.*/)?beta[12]_power(_\d+)?", "an optimizer slot"),
    (r"global_step", "the number of steps"),
    (r"(current_)?loss_scale|(good|bad)_steps", "the loss's scale"),
    (r"generator_predictions/temperature", "the temperature of sampling"),
)
# the outputs of a fine-tuned task: ELECTRA's run_finetuning, BERT's run_classifier and run_squad
TASK_HEAD = r"task_specific/.*|output_(weights|bias)|cls/squad/\w+"

DENSE, NORM = "(kernel|bias)", "LayerNorm/(gamma|beta)"
EMBEDDINGS = f"embeddings/((word|position|token_type)_embeddings|{NORM})"
LAYERS = (
    f"embeddings_project/{DENSE}|encoder/layer_\\d{{1,3}}/(attention/self/(query|key|value)/{DENSE}|"
    f"intermediate/dense/{DENSE}|(attention/)?output/(dense/{DENSE}|{NORM}))"
)
HEADS = {  # what stands on each tower
    "discriminator": f"discriminator_predictions/dense(_1)?/{DENSE}",
    "generator": f"generator_predictions/(dense/{DENSE}|{NORM}|output_bias)",
    "bert": f"cls/predictions/(transform/(dense/{DENSE}|{NORM})|output_bias)|"
    f"cls/seq_relationship/output_(weights|bias)|bert/pooler/dense/{DENSE}",
}
RENAMED = (  # one after the other
    ("/layer_", "/layer."),
    ("/dense_1/", "/dense_prediction/"),
    ("generator_predictions/output_bias", "generator_lm_head/bias"),
    ("_embeddings$", "_embeddings/weight"),
    ("/(kernel|gamma|output_weights)$", "/weight"),
    ("/(beta|output_bias)$", "/bias"),
    ("/", "."),
)


class Checkpoint(NamedTuple):
    source: str
    variables: dict[str, np.ndarray]
    left_out: dict[str, str]  # variables that were not read, and why


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether it is the prefix of a checkpoint, its index, or a directory that holds one and no model of another
    format."""
    if path.is_dir():
        others = ("config.toml", "config.json")
        return any(path.glob("*.index")) and not any((path / name).exists() for name in others)
    return _index_of(path).is_file()


def _index_of(path: pathlib.Path) -> pathlib.Path:
    return path if path.suffix == ".index" else path.with_name(f"{path.name}.index")


def _find(path: pathlib.Path) -> pathlib.Path:
    """The index: of a directory's the one that its file `checkpoint` names, or else the one of the last step."""
    if not path.is_dir():
        return _index_of(path)
    state = path / "checkpoint"
    if state.is_file():
        text = state.read_text(encoding="utf-8", errors="replace")
        named = re.search(r'^model_checkpoint_path: "(?:.*[/\\])?([^"/\\]+)"', text, re.MULTILINE)
        if named and (path / f"{named[1]}.index").is_file():
            return path / f"{named[1]}.index"
    found = sorted(path.glob("*.index"))
    if not found:
        raise UserError(f"{path}: holds no TensorFlow checkpoint; expected *.index")
    steps = {int(step[1]): index for index in found if (step := re.search(r"-(\d+)\.index$", index.name))}
    if len(found) > 1 and len(steps) < len(found):
        raise UserError(f"{path}: holds {len(found)} checkpoints; expected the prefix of one, as {found[0].stem}")
    return steps[max(steps)] if steps else found[0]


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoint's own files, and the configs beside it."""
    index = _find(path)
    beside = [index.parent / name for name in CONFIG_FILES]
    data = index.parent.glob(f"{glob.escape(index.stem)}.data-*")
    return [index, *sorted(data), *(file for file in beside if file.is_file())]


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """What a config beside the checkpoint says of TOLD. Raises UserError where it is damaged."""
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in CONFIG_FILES if (folder / name).is_file()), None)
    config = read_json(file) if file else {}
    return {key: config[key] for key in TOLD if key in config}


def read_checkpoint(path: pathlib.Path) -> Checkpoint:
    """All variables but those of the optimizer. Raises UserError as read_bundle does."""
    variables, left_out = read_bundle(
        _find(path), lambda name: next((reason for old, reason in NOT_NEEDED if re.fullmatch(old, name)), None)
    )
    return Checkpoint(str(path), variables, left_out)


def towers(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """`discriminator` and `generator`, or one of them, or `bert`: arrays by the names and in the layouts of
    Transformers. What towers share is the same array in both. Then the variables that are in none, with the reason,
    which is "unknown" where there is none.

    Raises UserError where the variables that say a tower's shape are missing.
    """
    found, used = {}, set()
    for tower, (embeddings, body) in _scopes(checkpoint.variables).items():
        _check_shapes(checkpoint, embeddings, body)
        family = "bert" if tower == "bert" else "electra"
        pattern = re.compile(f"{embeddings}/{EMBEDDINGS}|{body}/({LAYERS})|{HEADS[tower]}")
        own = [name for name in checkpoint.variables if pattern.fullmatch(name)]
        found[tower] = dict(_renamed(name, checkpoint.variables[name], family) for name in own)
        used.update(own)
    left_out = {
        name: "the head of a fine-tuned task" if re.fullmatch(TASK_HEAD, name) else "unknown"
        for name in sorted(checkpoint.variables.keys() - used)
    }
    return found, {**checkpoint.left_out, **left_out}


def has_own_generator(checkpoint: Checkpoint) -> bool:
    """Whether a generator has layers of its own, whose heads are 64 wide (model/modeling.py, get_generator_config)."""
    return any(name.startswith("generator/encoder/") for name in checkpoint.variables)


def _scopes(variables: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The towers, and where the embeddings and the rest of each stand. A generator may have the discriminator's
    embeddings, or, tied to it, nothing of its own but the head; a masked LM has no other tower."""
    scopes = {name.partition("/")[0] for name in variables}
    if "bert" in scopes:
        return {"bert": ("bert", "bert")}
    own = any(name.startswith("generator/embeddings/") for name in variables)
    body = "generator" if "generator" in scopes else "electra"
    found = {}
    if "discriminator_predictions" in scopes or "generator_predictions" not in scopes or body == "generator":
        found["discriminator"] = ("electra", "electra")
    if "generator_predictions" in scopes or body == "generator":
        found["generator"] = ("generator" if own else "electra", body)
    return found


def _check_shapes(checkpoint: Checkpoint, embeddings: str, body: str) -> None:
    needed = (
        f"{embeddings}/embeddings/word_embeddings",
        f"{embeddings}/embeddings/position_embeddings",
        f"{body}/encoder/layer_0/intermediate/dense/kernel",
    )
    for name in needed:
        if name not in checkpoint.variables or checkpoint.variables[name].ndim != 2:
            wrong = "is not of two axes" if name in checkpoint.variables else "is missing"
            raise UserError(f"{checkpoint.source}: {name} {wrong}; expected the variables of Google's ELECTRA or BERT")


def _renamed(name: str, array: np.ndarray, family: str) -> tuple[str, np.ndarray]:
    new = re.sub("^(electra|generator|bert)/", f"{family}/", name)
    for old, now in RENAMED:
        new = re.sub(old, now, new)
    return new, array.T if name.endswith("/kernel") else array
