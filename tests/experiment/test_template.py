"""Few-shot fine-tuning: the pretrained discriminator with its own head, and a template instead of a new one."""

import numpy as np
import pytest

import electrax
from electrax.config import UserError
from electrax.convert.weights import read_weights
from electrax.experiment.run import load_params
from electrax.experiment.saved import ConvertConfig, convert
from electrax.inference.template import TemplateClassifier
from tests.fixtures.finetuning import REVIEWS, call, finetuning, flat, make_pretrained, train, write_rows

TEMPLATE = "{text} is it {label} ?"
WORDS = {"no": "not so", "yes": "so"}
HEAD = {"template": TEMPLATE, "words": tuple(WORDS.values())}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pretrained(tmp_path_factory.mktemp("template") / "pretrained")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "rows"
    write_rows(folder / "train.csv", REVIEWS)
    write_rows(folder / "dev.csv", REVIEWS)
    return folder


def config(workdir, source, rows, head=HEAD, **changes):
    data = {"path": str(rows), "max_length": 24}
    values = {"init_from": str(source), "head": head, "optimizer": {"learning_rate": 0.02, "layer_decay": 1.0}}
    return finetuning(workdir, **(values | changes), data=data)


def test_training_starts_from_the_discriminator_with_its_head_and_zero_shot_figures(source, rows, tmp_path):
    train(config(tmp_path / "run", source, rows, steps=1, optimizer={"learning_rate": 1e-12}))
    before = flat({name: load_params(source)[1][name] for name in ("embeddings", "discriminator")})
    after = flat(load_params(tmp_path / "run")[1])
    assert before.keys() == after.keys()
    assert all(np.allclose(before[name], after[name], atol=1e-9) for name in before)
    texts = [text for text, _ in REVIEWS[:5]]
    zero_shot = electrax.load(source).classify(texts, WORDS, TEMPLATE)
    few_shot = electrax.load(tmp_path / "run").predict(texts)
    for zero, few in zip(zero_shot, few_shot, strict=True):
        assert zero["label"] == few["label"]
        assert zero["probability"] == pytest.approx(few["probability"], abs=1e-5)


def test_it_learns_which_word_fits_and_predicts_from_the_command_line(rows, tmp_path):
    quick = make_pretrained(tmp_path / "quick", model={"body": "modern"})  # whose larger weights move sooner
    workdir = tmp_path / "run"
    results = train(config(workdir, quick, rows, steps=120, optimizer={"learning_rate": 0.01}))
    assert results["metric"] == "accuracy" and results["score"] == 1.0
    assert isinstance(electrax.load(workdir), TemplateClassifier)
    (tmp_path / "new.txt").write_text("the house was good\nthe house was bad\n")
    status, output = call("predict", workdir, tmp_path / "new.txt")
    assert status == 0 and [line.split('"')[3] for line in output.splitlines()] == ["yes", "no"]


def test_it_converts_as_the_discriminator_that_it_is(source, rows, tmp_path):
    train(config(tmp_path / "run", source, rows, steps=1))
    convert(ConvertConfig(source=str(tmp_path / "run"), out=str(tmp_path / "out")))
    kept = read_weights(tmp_path / "out")["discriminator_predictions.dense_prediction.weight"]
    assert np.array_equal(kept.T, flat(electrax.load(tmp_path / "run").params)["discriminator/head/output/kernel"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"template": "{text}"}}, "template: expected {text} and {label} once"),
        ({"head": {"template": TEMPLATE, "words": ("so",)}}, "labels: expected at least two, not 1"),
        ({"head": {"words": ("a", "b")}}, "head.words are those of a head.template, which is empty"),
        ({"head": {"template": TEMPLATE, "kind": "number"}}, "head.template is for the task classify with head.kind"),
        ({"init_from": ""}, "head.template needs init_from, a pretrained discriminator"),
    ],
)
def test_what_does_not_go_with_a_template_is_said(source, rows, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path / "run", source, rows, **changes)


def test_as_many_words_as_classes_are_needed(source, rows, tmp_path):
    with pytest.raises(UserError, match="head.words has 3 words for the 2 classes no, yes"):
        train(config(tmp_path / "run", source, rows, head={"template": TEMPLATE, "words": ("a", "b", "c")}))


def test_a_masked_lm_alone_has_no_head_to_ask(rows, tmp_path):
    alone = make_pretrained(tmp_path / "mlm", objective={"kind": "mlm"}, generator={"width": 0, "heads": 0})
    with pytest.raises(UserError, match="has no discriminator's head, which head.template asks"):
        train(config(tmp_path / "run", alone, rows))
