"""Runs whose generator is a left-to-right language model."""

import json

import numpy as np
import pytest

import electrax
from electrax.config import UserError
from electrax.convert.export import ExportConfig
from electrax.experiment import finetune
from electrax.experiment.saved import ConvertConfig, convert, export
from tests.fixtures.finetuning import REVIEWS, TEXT, call, finetuning, make_pretrained, write_rows

FIGURES = {"step", "loss", "mlm_loss", "mlm_accuracy", "masked_accuracy", "sampled_accuracy", "replaced_share"}
FIGURES |= {"rtd_loss", "rtd_accuracy", "rtd_precision", "rtd_recall", "rtd_auc", "unigram_loss", "unigram_accuracy"}
SMALL = ["--model.layers=1", "--model.width=16", "--model.heads=2", "--model.embedding_width=8"]
QUICK = ["--steps=2", "--batch_size=8", "--data.max_length=16", "--data.vocab_size=120", "--data.holdout=0.2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A causal LM without a discriminator."""
    return make_pretrained(
        tmp_path_factory.mktemp("causal") / "run",
        objective={"kind": "mlm"},
        generator={"kind": "causal", "width": 0, "heads": 0},
    )


def test_a_run_with_a_causal_generator_trains_is_evaluated_and_loaded(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT.splitlines() * 4))
    words = ["--data.path", tmp_path / "text.txt", "--workdir", tmp_path / "run", "--generator.kind", "causal"]
    status, output = call("pretrain", "tiny", *words, *SMALL, *QUICK)
    assert status == 0 and "first loss" in output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() >= FIGURES and all(np.isfinite(results[name]) for name in ("mlm_loss", "rtd_auc"))
    status, output = call("evaluate", tmp_path / "run")
    assert status == 0 and f"{results['mlm_loss']:.4f}" in output
    model = electrax.load(tmp_path / "run")
    assert model.generator_kind == "causal" and len(model.detect("the cat ran")) == 3
    with pytest.raises(UserError, match="a causal generator has no counterpart in Transformers' ELECTRA$"):
        convert(ConvertConfig(source=str(tmp_path / "run"), out=str(tmp_path / "out")))


def test_a_causal_lm_alone_is_loaded_and_is_no_model_to_fine_tune_or_to_export(alone, tmp_path):
    model = electrax.load(alone)
    assert model.discriminator is None and model.generator.width == 16 and model.generator_kind == "causal"
    write_rows(tmp_path / "rows.csv", REVIEWS)
    config = finetuning(tmp_path / "run", init_from=str(alone), data={"path": str(tmp_path / "rows.csv")})
    with pytest.raises(UserError, match=f"^init_from {alone}: a causal LM alone, which does not read"):
        finetune.set_up(config)
    with pytest.raises(UserError, match="^a causal LM alone cannot be exported"):
        export(ExportConfig(model=str(alone), out=str(tmp_path / "out")))


def test_a_hybrid_lm_alone_fills_masks_and_is_a_model_to_fine_tune(tmp_path):
    generator = {"kind": "hybrid", "width": 0, "heads": 0}
    source = make_pretrained(tmp_path / "source", objective={"kind": "mlm"}, generator=generator)
    assert len(electrax.load(source).fill("the [MASK] ran", candidates=3)[0]) == 3
    assert finetune.resolve(finetuning(tmp_path / "run", init_from=str(source))).model.width == 16
    with pytest.raises(UserError, match="^a hybrid LM alone cannot be exported"):
        export(ExportConfig(model=str(source), out=str(tmp_path / "out")))
