"""The same weights and the same batch in Transformers' torch ELECTRA: live where it is installed, and stored."""

import functools

import jax
import numpy as np
import pytest

from electrax.models.encoder import Embeddings
from electrax.models.generator import Generator
from electrax.models.masks import padding_mask, segment_ids
from tests.models import parity


@pytest.fixture(scope="module", params=["stored", "live"])
def expected(request):
    if request.param == "live":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        return parity.transformers_outputs()
    with np.load(parity.FIXTURE) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def found():
    """Loss, metrics, gradients, arrays of the evaluation, and the generator's logits, of electrax."""
    task, params = parity.make_task(), parity.make_params()
    prepared = jax.tree.map(jax.numpy.asarray, parity.prepared_batch())

    # little is computed here and much compiled
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def everything(params):
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(params, prepared)
        _, arrays = task.evaluate(params, prepared)
        mask = padding_mask(prepared["ids"] != parity.PAD)
        types = segment_ids(prepared["ids"], parity.SEP, parity.PAD)
        embedded = Embeddings(task.discriminator).apply({"params": params["embeddings"]}, prepared["masked"], types)
        word, slots = params["embeddings"]["word"], prepared["slots"]
        logits = Generator(task.generator).apply({"params": params["generator"]}, embedded, word, mask, slots)
        return loss, metrics, parity.flatten(grads), arrays, logits

    return jax.device_get(everything(params))


def test_the_stored_outputs_were_made_with_samples_right_and_wrong(expected):
    replaced = expected["corrupted"] != parity.IDS
    assert 0 < replaced.sum() < parity.USED.sum()


def test_generator_logits_at_the_slots_are_transformers(found, expected):
    real = found[4][..., : parity.VOCABULARY]
    np.testing.assert_allclose(real, expected["generator_logits"], rtol=1e-4, atol=1e-5)


def test_samples_and_corrupted_rows_are_transformers(found, expected):
    assert found[3]["corrupted"].tolist() == expected["corrupted"].tolist()


def test_discriminator_logits_of_real_tokens_are_transformers(found, expected):
    real = parity.IDS != parity.PAD
    np.testing.assert_allclose(found[3]["score"][real], expected["discriminator_logits"][real], rtol=1e-4, atol=1e-5)


def test_both_losses_and_their_sum_are_transformers(found, expected):
    loss, metrics, *_ = found
    for name in ("mlm_loss", "rtd_loss"):
        np.testing.assert_allclose(metrics[name].total / metrics[name].weight, expected[name], rtol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)


def test_every_gradient_is_transformers(found, expected):
    gradients = found[2]
    assert {f"gradient/{path}" for path in gradients} == {key for key in expected if key.startswith("gradient/")}
    for path, gradient in gradients.items():
        want = expected[f"gradient/{path}"]
        # rounding grows with the largest terms that cancel: key biases have no gradient but for rounding
        np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(want).max()), err_msg=path)


def test_every_gradient_but_that_of_padding_is_something(found):
    for path, gradient in found[2].items():
        assert np.abs(gradient).max() > 1e-4, path
    assert not found[2]["embeddings/word"][parity.VOCABULARY :].any()
    assert not found[2]["generator/head/output_bias"][parity.VOCABULARY :].any()
