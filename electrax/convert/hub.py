"""Models of the Hugging Face hub, named `hub:NAME`: nothing else is looked for on a network."""

import importlib.util
import os
import pathlib
import re

from electrax.config import UserError
from electrax.convert.config_json import CONFIG_FILE, PAIR, read_json
from electrax.convert.weights import READERS, TORCH_FILE
from electrax.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE

HUB_PREFIX = "hub:"
TOKENIZERS = (HUGGING_FACE_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE)


def is_name(name: str) -> bool:
    """Whether it has the form of a name on the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii()  # which older versions of the library do not ask for


def from_hub(name: str) -> pathlib.Path:
    """The local folder of a model of the Hugging Face hub: from the cache at once, or downloaded. UserError where it
    can be had neither way."""
    import huggingface_hub

    if not is_name(name):
        raise UserError(f"{HUB_PREFIX}{name}: no name of a model on the Hugging Face hub, as google/electra-small")
    cached = _cached(name)
    if cached and any((folder / file).is_file() for folder in (cached, cached / PAIR[0]) for file in TOKENIZERS):
        return cached
    try:
        files = [file.rfilename for file in huggingface_hub.model_info(name, timeout=5).siblings or ()]
        found = huggingface_hub.snapshot_download(name, allow_patterns=_wanted(files), etag_timeout=5)
    except Exception as error:  # httpx's, requests' or the library's own, by its version
        if cached:  # the tokenizer may be elsewhere
            return cached
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{HUB_PREFIX}{name}: not whole in the cache of the Hugging Face hub, and it cannot be fetched: {reason}"
        ) from None
    return pathlib.Path(found)


def _formats() -> list[str]:
    """The files of weights that can be read here, best first."""
    has_torch = importlib.util.find_spec("torch") is not None
    return [file for file in READERS if file != TORCH_FILE or has_torch]


def _wanted(files: list[str]) -> list[str]:
    """Of a repository's files those of the model, with its weights in one format: the first that can be read, or where
    there is none that, torch's."""
    own = [pathlib.PurePosixPath(file) for file in files]
    own = [file for file in own if str(file.parent) in (".", *PAIR)]
    others = [file for file in own if file.suffix in (".json", ".model") or file.name == VOCABULARY_FILE]
    for kind in (*_formats(), TORCH_FILE):
        stem, _, ending = kind.partition(".")
        weights = [file for file in own if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.{ending}", file.name)]
        if weights:
            return [str(file) for file in (*others, *weights)]
    return [str(file) for file in others]


def _cached(name: str) -> pathlib.Path | None:
    """The snapshot in the cache, if what has been fetched of it are a config and all its weights."""
    from huggingface_hub import try_to_load_from_cache

    for folders in ((".",), PAIR):
        config = try_to_load_from_cache(name, f"{folders[0]}/{CONFIG_FILE}".removeprefix("./"))
        if isinstance(config, str):
            snapshot = pathlib.Path(config).parents[0 if folders == (".",) else 1]
            if all(_holds_weights(snapshot / folder) for folder in folders):
                return snapshot
    return None


def _holds_weights(folder: pathlib.Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and any(_is_whole(folder, file) for file in _formats())


def _is_whole(folder: pathlib.Path, file: str) -> bool:
    index = folder / f"{file}.index.json"
    if (folder / file).is_file() or not index.is_file():
        return (folder / file).is_file()
    shards = read_json(index).get("weight_map")
    return isinstance(shards, dict) and all(os.path.isfile(folder / str(shard)) for shard in shards.values())
