"""Models of other formats as work directories, and the cache of those that are loaded."""

import json
import logging
import pathlib

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import electrax
from electrax.config import UserError
from electrax.convert import huggingface
from electrax.convert.model import Head
from electrax.convert.safetensors import read_safetensors, write_safetensors
from electrax.convert.weights import read_weights
from electrax.experiment import foreign
from electrax.experiment.config import read_config
from electrax.experiment.foreign import ConvertConfig
from electrax.experiment.run import WEIGHTS_FILE
from electrax.experiment.saved import convert
from tests.convert.tiny_models import make_classifier, make_pair, make_tokenizer

TOKENIZER = make_tokenizer()
CHOICE = Head("classify", "choice", "dense")
CASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "The", "the", "cat", "##s", "ℝ"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "electrax" / "models"


def assert_equal_trees(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_equal_trees(found[name], value)
        else:
            assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("head", [None, Head("classify", "classes", "dense", ("bad", "good")), CHOICE])
def test_to_hugging_face_and_back_every_bit_is_the_same(head, tmp_path):
    model = make_classifier(TOKENIZER, head) if head else make_pair(TOKENIZER)
    word = np.array(model.params["embeddings"]["word"])
    word[TOKENIZER.vocab_size :] = 0  # padding, which exists here alone
    params = {**model.params, "embeddings": {**model.params["embeddings"], "word": word}}
    if head is None:
        bias = np.array(params["generator"]["head"]["output_bias"])
        bias[TOKENIZER.vocab_size :] = 0
        params["generator"] = {**params["generator"], "head": {**params["generator"]["head"], "output_bias": bias}}
    huggingface.write(tmp_path / "theirs", model, TOKENIZER)
    for source, out in (("theirs", "ours"), ("ours", "back"), ("back", "again")):
        convert(ConvertConfig(source=str(tmp_path / source), out=str(tmp_path / out)))
    assert_equal_trees(unflatten_dict(read_safetensors(tmp_path / "ours" / WEIGHTS_FILE), sep="/"), params)
    ours, again = ((tmp_path / folder / WEIGHTS_FILE).read_bytes() for folder in ("ours", "again"))
    assert ours == again


def test_a_model_in_shards_is_loaded_whole(tmp_path):
    model = make_classifier(TOKENIZER, CHOICE)
    huggingface.write(tmp_path / "theirs", model, TOKENIZER)
    tensors = read_weights(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        own = {name: tensors[name] for name in tensors if shard_of[name] == shard}
        write_safetensors(tmp_path / "theirs" / shard, own)
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    loaded = electrax.load(tmp_path / "theirs").params
    assert_equal_trees(loaded["discriminator"], model.params["discriminator"])
    assert_equal_trees(loaded["head"], model.params["head"])


def make_encoder_of_bert(folder: pathlib.Path) -> None:
    """One with a pooler, and a constant that older versions of Transformers saved."""
    model = make_classifier(TOKENIZER, Head("classify", "number", "pooled"), embedding_width=8)
    huggingface.write(folder, model, TOKENIZER)
    tensors = {name: tensor for name, tensor in read_weights(folder).items() if not name.startswith("classifier")}
    tensors["bert.embeddings.position_ids"] = np.arange(16)[None]
    write_safetensors(folder / "new", tensors)
    (folder / "new").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))


def test_what_is_left_out_is_in_the_report_and_on_loading_said_once_unless_nothing_was_learnt_in_it(tmp_path, caplog):
    make_encoder_of_bert(tmp_path / "bert")
    pooler = "the pooler, which only next-sentence prediction was trained with"
    report = convert(ConvertConfig(source=str(tmp_path / "bert"), out=str(tmp_path / "out")))
    assert report["left_out"] == {
        "bert.embeddings.position_ids": "a constant, not a weight",
        "bert.pooler.dense.bias": pooler,
        "bert.pooler.dense.weight": pooler,
    }
    caplog.set_level(logging.WARNING, logger="electrax")
    for _ in range(2):
        electrax.load(tmp_path / "bert")
    names = "bert.pooler.dense.bias, bert.pooler.dense.weight"
    assert caplog.messages == [f"{tmp_path / 'bert'}: left out {names}: {pooler}"]


def test_bert_has_no_narrower_embeddings(tmp_path):
    model = make_classifier(TOKENIZER, Head("classify", "number", "pooled"), embedding_width=6)
    with pytest.raises(UserError, match="a pooled head is BERT's, whose embeddings are as wide as its hidden states"):
        huggingface.write(tmp_path, model, TOKENIZER)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def pieces(folder: pathlib.Path, lowercase: bool | None = None) -> list[str]:
    tokenizer = huggingface.read_tokenizer(folder, lowercase)
    return tokenizer.pieces(tokenizer.encode_batch(["The cats"])[0])


def test_text_is_lowercased_as_it_is_told_or_the_files_say_or_where_the_vocabulary_has_no_capitals(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "vocab.txt").write_text("\n".join(CASED) + "\n", encoding="utf-8")
    cased, uncased = ["The", "cat", "##s"], ["the", "cat", "##s"]
    assert pieces(tmp_path) == cased and pieces(tmp_path / "vocab.txt") == cased
    assert pieces(tmp_path, True) == uncased
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert pieces(tmp_path) == uncased and pieces(tmp_path, False) == cased
    huggingface.read_tokenizer(tmp_path, lowercase=False).save(tmp_path)
    assert pieces(tmp_path) == cased and pieces(tmp_path, True) == uncased
    (tmp_path / "vocab.txt").unlink()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=f"^lowercase is for a vocab.txt; {path} has none$"):
            pieces(path, True)


def test_rows_are_as_long_as_the_tokenizer_says_if_that_is_a_number_of_positions(tmp_path):
    model = make_pair(TOKENIZER)
    huggingface.write(tmp_path / "short", model, TOKENIZER, trained_length=10)
    huggingface.write(tmp_path / "whole", model, TOKENIZER)
    for folder, length in (("short", 10), ("whole", 16)):
        for tower in ("discriminator", "generator"):
            settings = json.loads((tmp_path / folder / tower / "tokenizer_config.json").read_text())
            assert settings["model_max_length"] == length
        out = tmp_path / f"{folder} out"
        convert(ConvertConfig(source=str(tmp_path / folder), out=str(out)))
        assert read_config(out).data.max_length == length and read_config(out).model.max_length == 16
    folder = tmp_path / "short" / "discriminator"
    for said in (10**30, 7, 0, -1, 17, True, "10", 9.5, None):
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": said}))
        assert huggingface.row_length(folder, 16) == 16


# -- the cache ---------------------------------------------------------------------------------------------------------


def bias_of(folder: pathlib.Path) -> float:
    return float(np.asarray(electrax.load(folder).params["discriminator"]["head"]["output"]["bias"])[0])


def test_a_model_that_is_loaded_is_converted_once_and_again_when_it_changes(tmp_path, cache):
    folder = tmp_path / "theirs"
    huggingface.write(folder, make_pair(TOKENIZER), TOKENIZER)
    first = bias_of(folder)
    kept = list(cache.iterdir())
    assert bias_of(folder) == first and list(cache.iterdir()) == kept and len(kept) == 1
    tensors = dict(read_weights(folder / "discriminator"))
    name = "discriminator_predictions.dense_prediction.bias"
    tensors[name] = tensors[name] + np.float32(1)
    write_safetensors(folder / "discriminator" / "new", tensors)
    (folder / "discriminator" / "new").rename(folder / "discriminator" / "model.safetensors")
    assert bias_of(folder) == np.float32(first) + np.float32(1)


def test_of_two_that_convert_a_model_at_once_the_later_takes_what_the_earlier_made(tmp_path, cache, monkeypatch):
    huggingface.write(tmp_path / "theirs", make_pair(TOKENIZER), TOKENIZER)
    read = foreign.read

    def overtaken(*arguments):
        monkeypatch.setattr(foreign, "read", read)
        (tmp_path / "inode").write_text(str(foreign.as_workdir(tmp_path / "theirs").stat().st_ino))
        return read(*arguments)

    monkeypatch.setattr(foreign, "read", overtaken)
    found = foreign.as_workdir(tmp_path / "theirs")
    assert str(found.stat().st_ino) == (tmp_path / "inode").read_text() and list(cache.iterdir()) == [found]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    huggingface.write(tmp_path / "theirs", make_pair(TOKENIZER), TOKENIZER)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"^{tmp_path}/file/electrax.*: Not a directory$"):
        electrax.load(tmp_path / "theirs")
