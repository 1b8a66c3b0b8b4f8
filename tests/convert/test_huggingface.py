"""Hugging Face directories in and out, against Transformers' own models in torch."""

import json
import pathlib

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest

import electrax
from electrax.convert.weights import read_weights
from electrax.experiment.foreign import ConvertConfig
from electrax.experiment.saved import convert
from tests.fixtures.finetuning import call

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "##s", ".", "dog"]
SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
# [CLS] a b c [SEP] d [SEP], and a shorter row
IDS = np.array([[2, 5, 6, 7, 3, 8, 9, 3], [2, 13, 11, 3, 12, 3, 0, 0]], np.int32)
TYPES = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]])
CHOICES = np.stack([IDS, IDS[::-1]], axis=1)


def electra(**more):
    return transformers.ElectraConfig(**SHAPE, embedding_size=6, **more)


def bert(**more):
    return transformers.BertConfig(**SHAPE, **more)


LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
MULTI = {**LABELS, "problem_type": "multi_label_classification"}
TAGS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2}}
MODELS = {
    "ElectraForPreTraining": electra(),
    "ElectraForMaskedLM": electra(),
    "ElectraModel": electra(),
    "ElectraForSequenceClassification": electra(**LABELS),
    "ElectraForSequenceClassification, several labels": electra(**MULTI),
    "ElectraForSequenceClassification, a number": electra(num_labels=1, problem_type="regression"),
    "ElectraForTokenClassification": electra(**TAGS),
    "ElectraForQuestionAnswering": electra(),
    "ElectraForMultipleChoice": electra(),
    "BertForMaskedLM": bert(),
    "BertForPreTraining": bert(),
    "BertModel": bert(),
    "BertForSequenceClassification": bert(**LABELS),
    "BertForTokenClassification": bert(**TAGS),
    "BertForQuestionAnswering": bert(),
    "BertForMultipleChoice": bert(),
}


def make(name: str, folder: pathlib.Path, config=None) -> torch.nn.Module:
    """A model with weights of size 1 (Transformers' own are so small that every output is nearly the same), saved."""
    torch.manual_seed(7)
    model = getattr(transformers, name.partition(",")[0])(config or MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return model


def theirs(model: torch.nn.Module) -> dict[str, np.ndarray]:
    choice = type(model).__name__.endswith("MultipleChoice")
    ids, types = (CHOICES, np.stack([TYPES, TYPES[::-1]], axis=1)) if choice else (IDS, TYPES)
    if type(model).__name__.endswith("TokenClassification"):
        types = np.zeros_like(ids)
    with torch.inference_mode():
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids != 0)}
        out = model(**inputs, token_type_ids=torch.tensor(types))
    return {name: value.float().numpy() for name, value in out.items() if isinstance(value, torch.Tensor)}


def ours(model, kind: str) -> dict[str, np.ndarray]:
    """The same outputs of an electrax model, by the names of Transformers."""
    if isinstance(model, electrax.inference.model.PretrainedModel):
        return pretrained_outputs(model, kind)
    params, task, ids = model.params, model.task, jnp.asarray(IDS)
    if kind.endswith("QuestionAnswering"):
        head = task.head().apply({"params": params["head"]}, task.hidden(params, ids))
        return {"start_logits": head.start, "end_logits": head.end}
    return {"logits": task.logits(params, {"ids": jnp.asarray(CHOICES) if kind.endswith("MultipleChoice") else ids})}


def pretrained_outputs(model, kind: str) -> dict[str, np.ndarray]:
    from electrax.models.discriminator import Discriminator
    from electrax.models.encoder import Embeddings, Encoder
    from electrax.models.generator import Generator
    from electrax.models.masks import padding_mask

    tower = "discriminator" if model.discriminator else "generator"
    config, mask = model.discriminator or model.generator, padding_mask(jnp.asarray(IDS != 0))
    embedded = Embeddings(config).apply({"params": model.params["embeddings"]}, jnp.asarray(IDS), jnp.asarray(TYPES))
    if kind.endswith("PreTraining") and tower == "discriminator":
        return {"logits": Discriminator(config).apply({"params": model.params[tower]}, embedded, mask)}
    if tower == "generator":
        word = model.params["embeddings"]["word"]
        logits = Generator(config).apply({"params": model.params[tower]}, embedded, word, mask)
        return {"logits": logits[..., : len(VOCABULARY)]}
    hidden = Encoder(config).apply({"params": model.params[tower]["encoder"]}, embedded, mask)
    return {"last_hidden_state": hidden}


def close(ours: dict, theirs: dict) -> None:
    real = IDS != 0
    theirs = {"logits": theirs["prediction_logits"]} if "prediction_logits" in theirs else theirs
    for name, value in ours.items():
        here, there = np.asarray(value), theirs[name].reshape(np.shape(value))
        if here.shape[:2] == IDS.shape:
            here, there = here[real], there[real]
        np.testing.assert_allclose(here, there, atol=1e-5, rtol=0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = make(name, tmp_path / "theirs")
    close(ours(electrax.load(tmp_path / "theirs"), name.partition(",")[0]), theirs(model))


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("BertForPreTraining", "BertModel", "ElectraModel")]
)
def test_there_and_back_every_tensor_is_the_same_and_transformers_opens_it(name, tmp_path):
    model = make(name, tmp_path / "theirs")
    convert(ConvertConfig(source=str(tmp_path / "theirs"), out=str(tmp_path / "ours")))
    convert(ConvertConfig(source=str(tmp_path / "ours"), out=str(tmp_path / "back")))
    kind = json.loads((tmp_path / "back" / "config.json").read_text())["architectures"][0]
    opened, loading = getattr(transformers, kind).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(theirs(opened.eval()), theirs(model))
    if kind == name.partition(",")[0]:  # an encoder of BERT without its pooler is also one of ELECTRA
        before, after = (read_weights(tmp_path / folder) for folder in ("theirs", "back"))
        assert {key for key in before if "pooler" not in key or "Sequence" in name or "Choice" in name} == set(after)
        for key in after:
            assert np.array_equal(before[key], after[key]), key
    assert {**opened.config.id2label} == {**model.config.id2label} or kind != name or "a number" in name


def test_a_discriminator_and_a_generator_become_one_tree_and_two_folders_again(tmp_path):
    generator_shape = {**SHAPE, "hidden_size": 4, "intermediate_size": 10}
    discriminator = make("ElectraForPreTraining", tmp_path / "d")
    generator = make(
        "ElectraForMaskedLM", tmp_path / "g", transformers.ElectraConfig(**generator_shape, embedding_size=6)
    )
    generator.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
    generator.save_pretrained(tmp_path / "g")
    report = convert(ConvertConfig(source=str(tmp_path / "d"), generator=str(tmp_path / "g"), out=str(tmp_path / "o")))
    assert (
        "generator: generator_lm_head.bias" in report["used"] and "electra.embeddings.LayerNorm.bias" in report["used"]
    )
    convert(ConvertConfig(source=str(tmp_path / "o"), out=str(tmp_path / "back")))
    for folder, model in {"discriminator": discriminator, "generator": generator}.items():
        opened = transformers.AutoModel.from_pretrained(tmp_path / "back" / folder)
        assert type(opened).__name__ == "ElectraModel"
        after = read_weights(tmp_path / "back" / folder)
        for key, value in model.state_dict().items():
            if key in after:
                assert np.array_equal(value.numpy(), after[key]), key
    assert electrax.load(tmp_path / "back").generator.width == 4


def test_a_tokenizer_comes_back_with_its_special_tokens_around_a_pair(tmp_path):
    make("ElectraForPreTraining", tmp_path / "theirs")
    convert(ConvertConfig(source=str(tmp_path / "theirs"), out=str(tmp_path / "ours")))
    convert(ConvertConfig(source=str(tmp_path / "ours"), out=str(tmp_path / "back")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    found = tokenizer("The cats", "Dog.")
    assert found["input_ids"] == [2, 5, 6, 11, 3, 13, 12, 3] and found["token_type_ids"] == [0] * 5 + [1] * 3
    assert (tokenizer.mask_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("[MASK]", 0, 16)


# -- Flax --------------------------------------------------------------------------------------------------------------


def as_flax(state: dict) -> dict:
    """The tree that Transformers' Flax models (version 4) keep of such weights; what is tied is there once."""
    tree: dict = {}
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        array = tensor.numpy()
        if name in ("generator_lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
            continue
        if leaf == "weight":
            leaf = "embedding" if parents[-1].endswith("_embeddings") else "scale" if array.ndim == 1 else "kernel"
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = array.T if leaf == "kernel" else array
    return tree


@pytest.mark.parametrize(
    "name",
    [
        "ElectraForPreTraining",
        "ElectraForMaskedLM",
        "ElectraForSequenceClassification",
        "ElectraForMultipleChoice",
        "BertForMaskedLM",
        "BertForQuestionAnswering",
    ],
)
def test_a_model_of_flax_gives_the_logits_of_the_one_in_torch(name, tmp_path):
    model = make(name, tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    weights = flax.serialization.msgpack_serialize(as_flax(model.state_dict()))
    (tmp_path / "theirs" / "flax_model.msgpack").write_bytes(weights)
    close(ours(electrax.load(tmp_path / "theirs"), name), theirs(model))


def test_a_question_answerer_predicts_from_a_table_of_questions_and_contexts(tmp_path):
    make("ElectraForQuestionAnswering", tmp_path / "theirs")
    (tmp_path / "rows.csv").write_text("question,context\nwho sat,the cat sat on a mat.\n")
    row = json.loads(call("predict", tmp_path / "theirs", tmp_path / "rows.csv")[1])
    assert row["text"] and row["text"] in "the cat sat on a mat."
