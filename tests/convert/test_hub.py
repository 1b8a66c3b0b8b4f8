"""Names on the Hugging Face hub, without a network: a cache laid out by hand, and answers that are made up."""

import json
import pathlib
import shutil
import types

import huggingface_hub
import huggingface_hub.constants
import pytest

import electrax
from electrax.config import UserError
from electrax.convert import huggingface
from electrax.convert.hub import from_hub
from tests.convert.tiny_models import make_pair, make_tokenizer

TOKENIZER = make_tokenizer()
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """The cache of the hub, empty; offline."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(hub: pathlib.Path, name: str) -> pathlib.Path:
    """The folder where the cache keeps the files of a repository."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    return folder / "snapshots" / REVISION


def unlink(*files: pathlib.Path) -> None:
    for file in files:
        file.unlink()


def test_a_model_in_the_cache_is_loaded_and_nobody_asked_for_it(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: asked.append(name))
    huggingface.write(snapshot(hub, "org/pair"), make_pair(TOKENIZER), TOKENIZER)
    assert electrax.load("hub:org/pair").generator.width == 4
    shutil.copytree(from_hub("org/pair") / "generator", snapshot(hub, "bert"), dirs_exist_ok=True)
    assert electrax.load("hub:bert").discriminator is None
    assert not asked


def test_a_cache_that_lacks_a_part_of_the_model_is_not_taken_for_it(hub):
    folder = snapshot(hub, "org/half")
    huggingface.write(folder, make_pair(TOKENIZER), TOKENIZER)
    tower = folder / "discriminator"
    weights = (tower / "model.safetensors").read_bytes()

    def fails(name: str = "org/half") -> None:
        with pytest.raises(UserError, match=f"^hub:{name}: not whole in the cache.*offline"):
            electrax.load(f"hub:{name}")

    (tower / "model.safetensors").unlink()
    fails()
    (tower / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    fails()
    (tower / "1.safetensors").touch()
    assert from_hub("org/half") == folder
    (tower / "1.safetensors").unlink()
    (tower / "model.safetensors").write_bytes(weights)
    assert from_hub("org/half") == folder
    (tower / "config.json").unlink()
    fails()
    fails("nobody/no-such-electra")


def fetch(monkeypatch, *files: str) -> set[str]:
    """The files that are asked for of a repository with these."""
    asked = []
    found = types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: found)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns, etag_timeout: asked.extend(allow_patterns)
    )
    with pytest.raises(TypeError):  # there is no folder
        from_hub("org/name")
    return set(asked)


def test_weights_are_fetched_in_one_format_alone(monkeypatch):
    torch, flax, others = "pytorch_model.bin", "flax_model.msgpack", {"config.json", "vocab.txt", "tokenizer.json"}
    beside = ["README.md", "tf_model.h5", "onnx/model.onnx", "step-9/model.safetensors", "rust_model.ot", *others]
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {"model.safetensors.index.json"}
    assert fetch(monkeypatch, "model.safetensors", torch, flax, *beside) == {"model.safetensors", *others}
    assert fetch(monkeypatch, *shards, torch, *beside) == {*shards, *others}
    pair = {f"{tower}/{file}" for tower in ("discriminator", "generator") for file in ("config.json", flax)}
    assert fetch(monkeypatch, *pair, "README.md") == pair
    for installed, wanted in ((True, torch), (False, flax)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=installed: there or None)
        assert fetch(monkeypatch, torch, flax, *beside) == {wanted, *others}
        assert fetch(monkeypatch, torch, *beside) == {torch, *others}  # so that it can be said who reads it


def test_a_cached_model_without_its_tokenizer_is_fetched_and_taken_as_it_is_where_that_fails(hub, monkeypatch):
    folder = snapshot(hub, "org/bare")
    huggingface.write(folder, make_pair(TOKENIZER), TOKENIZER)
    unlink(*folder.glob("*/tokenizer*"))
    assert from_hub("org/bare") == folder
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: types.SimpleNamespace(siblings=None))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns, etag_timeout: "/fetched")
    assert from_hub("org/bare") == pathlib.Path("/fetched")


@pytest.mark.parametrize("name", ["runs/a/b", "runs/x..y", "x--y", "runs/x.", "a.git", "é/x", "-x"])
def test_what_cannot_be_a_name_on_the_hub_is_refused(name):
    with pytest.raises(UserError, match=f"^{name}: no such file or directory$"):
        electrax.load(name)
    with pytest.raises(UserError, match=f"^hub:{name}: no name of a model on the Hugging Face hub"):
        electrax.load(f"hub:{name}")


def test_a_name_alone_is_a_path_and_nobody_is_asked_for_it(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: asked.append(name))
    huggingface.write(snapshot(hub, "org/pair"), make_pair(TOKENIZER), TOKENIZER)
    with pytest.raises(UserError, match="^org/pair: no such file or directory; .* would be hub:org/pair$"):
        electrax.load("org/pair")
    assert not asked


def test_an_error_that_says_nothing_is_named_by_its_kind(monkeypatch):
    def fail(name, timeout):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    with pytest.raises(UserError, match="^hub:org/name: .*it cannot be fetched: TimeoutError$"):
        electrax.load("hub:org/name")
