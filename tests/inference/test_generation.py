"""Continuations and likelihoods against plain loops over the whole text, without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.inference.generation import CausalModel
from electrax.inference.model import PretrainedModel
from electrax.models.decoding import Sampling
from electrax.models.encoder import Embeddings, EncoderConfig
from electrax.models.generator import Generator
from electrax.models.masks import padding_mask
from tests.fixtures.compilations import compilations

LINES = ["the cat sat on the mat", "a dog ran under the red mat", "big cats, small dogs and one blue hat"] * 20
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train("wordpiece", LINES, 80)


def make_model(tokenizer, body="electra") -> CausalModel:
    config = EncoderConfig(
        tokenizer.vocab_size, 2, 16, 2, 24, embedding_width=8, max_length=LENGTH, body=body, dropout=0.0
    )
    embeddings, generator = Embeddings(config), Generator(config, "causal")
    ids = jnp.zeros((1, 3), jnp.int32)

    def draw():
        table = embeddings.init(jax.random.key(0), ids)["params"]
        embedded = embeddings.apply({"params": table}, ids)
        mask = jnp.ones((1, 1, 1, 3), bool)
        params = generator.init(jax.random.key(1), embedded, table["word"], mask)["params"]
        return jax.tree.map(lambda leaf: 3 * leaf, {"embeddings": table, "generator": params})

    return CausalModel(jax.jit(draw)(), tokenizer, config, LENGTH)


@pytest.fixture(scope="module", params=["electra", "modern"])
def model(request, tokenizer):
    return make_model(tokenizer, request.param)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: EncoderConfig, params, row, real):
    embedded = Embeddings(config).apply({"params": params["embeddings"]}, row)
    word = params["embeddings"]["word"]
    return Generator(config, "causal").apply({"params": params["generator"]}, embedded, word, padding_mask(real))


def log_probs(model: CausalModel, ids: list[int]) -> np.ndarray:
    """Of every token at each place [n, V], from the tokens before it, all read at once."""
    row = np.zeros((1, LENGTH), np.int32)  # of one length, so that one program does
    row[0, : len(ids)] = ids
    logits = logits_of(model.config, model.params, row, np.arange(LENGTH)[None] < len(ids))
    logits = np.asarray(logits[0, : len(ids), : model.config.vocab_size], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy(model: CausalModel, prompt: str, most: int) -> tuple[list[int], float]:
    t = model.tokenizer
    ids, total = [t.cls_id, *t.encode_batch([prompt])[0]], 0.0
    written: list[int] = []
    while len(written) < most and t.sep_id not in written:
        scores = log_probs(model, [*ids, *written, t.unk_id])[-1]
        scores[[t.pad_id, t.unk_id, t.cls_id, t.mask_id]] = -np.inf
        written.append(int(scores.argmax()))
        total += scores[written[-1]] - np.log(np.exp(scores).sum())
    return written, total


def test_greedy_continuations_of_prompts_of_different_lengths_are_those_of_a_plain_loop(model):
    prompts = ["the cat", "a dog ran under the red", ""]
    for prompt, [found] in zip(prompts, model.generate(prompts, max_tokens=5), strict=True):
        written, total = greedy(model, prompt, 5)
        prompt_ids = [model.tokenizer.cls_id, *model.tokenizer.encode_batch([prompt])[0]]
        whole = model.tokenizer.decode([*prompt_ids, *written])
        assert model.tokenizer.decode(prompt_ids) + found.text == whole
        assert found.reason == ("end" if written[-1] == model.tokenizer.sep_id else "length")
        np.testing.assert_allclose(found.log_probability, total, rtol=1e-4)


def test_a_prompt_is_continued_up_to_the_last_position_whatever_is_beside_it(model):
    long = "a dog ran under the red mat"
    alone = model.generate(["the cat"], max_tokens=50)
    together = model.generate(["the cat", long], max_tokens=50)
    assert together[0][0].text == alone[0][0].text
    written, _ = greedy(model, long, LENGTH - 1 - len(model.tokenizer.encode_batch([long])[0]))
    ids = [model.tokenizer.cls_id, *model.tokenizer.encode_batch([long])[0]]
    assert model.tokenizer.decode(ids) + together[1][0].text == model.tokenizer.decode([*ids, *written])


def test_samples_depend_on_the_seed_the_prompt_and_their_number_alone(model):
    drawn = Sampling(temperature=1.0)
    two = model.generate(["the", "a dog"], 6, drawn, samples=3, seed=1)
    assert two == model.generate(["the", "a dog"], 6, drawn, samples=3, seed=1)
    assert [each.text for each in two[0]] == [e.text for e in model.generate(["the"], 6, drawn, samples=3, seed=1)[0]]
    assert two != model.generate(["the", "a dog"], 6, drawn, samples=3, seed=2)
    assert len({each.text for each in two[0]}) > 1


def test_after_warming_up_no_prompt_is_compiled_for(tokenizer):
    model = make_model(tokenizer)
    sampling = Sampling(temperature=0.5)
    # prompts padded to 8 and 15 tokens, each with 16 and with 2 samples together
    assert model.warm_up(5, sampling, samples=18) == 4
    with compilations() as found:
        for prompt in ("", "cat", "the cat sat on", "the cat sat on the mat the cat sat on"):
            model.generate([prompt], 5, sampling, samples=18, seed=3)
    assert not found


def test_a_continuation_ends_before_a_stop_string(model):
    whole = model.generate(["the cat"], max_tokens=6)[0][0].text
    stop = whole[2:4]
    found = model.generate(["the cat"], max_tokens=6, stop=["never there", stop])[0][0]
    assert (found.text, found.reason) == (whole[: whole.find(stop)], "stop")


@pytest.mark.parametrize("stride", [0, 1, 5])
def test_a_long_text_is_read_in_windows_in_which_each_token_counts_once(model, stride):
    text = "the cat sat on the mat and a dog ran under the red mat, big cats and small dogs"
    ids = [*model.tokenizer.encode_batch([text])[0], model.tokenizer.sep_id]
    room, step = LENGTH - 1, stride or (LENGTH - 1) // 2
    assert len(ids) > 2 * room - 10
    total, counted = 0.0, 0
    for start in range(0, len(ids), step):
        piece = ids[start : start + room]
        scores = log_probs(model, [model.tokenizer.cls_id, *piece])
        for place, token in enumerate(piece):
            if start + place >= counted:
                total += scores[place + 1, token]
                counted += 1
    found = model.likelihood(text, stride)
    assert found.tokens == len(ids) == counted
    np.testing.assert_allclose(found.log_probability, total, rtol=1e-4)
    np.testing.assert_allclose(found.perplexity, np.exp(-total / counted), rtol=1e-4)


def test_prompts_and_numbers_that_do_not_fit_are_one_clear_line(model):
    with pytest.raises(UserError, match="prompt 1 has .* tokens, but the model takes 14"):
        model.generate(["the", "the cat sat on the mat " * 4])
    with pytest.raises(UserError, match="list of prompts"):
        model.generate("the")
    with pytest.raises(UserError, match="stride from 1 to 15"):
        model.likelihood("the", 16)


def test_a_model_without_a_decoder_generates_nothing(tokenizer):
    made = make_model(tokenizer)
    model = PretrainedModel(made.params, tokenizer, made.config, None, LENGTH)
    with pytest.raises(UserError, match="^generate: this model has no decoder; expected a generator.kind causal"):
        model.generate(["the"])


# -- scores of texts --------------------------------------------------------------------------------------------------


def test_pseudo_log_likelihood_sums_each_tokens_log_probability_masked_out_alone(tokenizer):
    made = make_model(tokenizer)
    model = PretrainedModel(made.params, tokenizer, made.config, None, LENGTH)
    texts = ["the cat sat", "a dog"]
    for text, found in zip(texts, model.pseudo_log_likelihood(texts), strict=True):
        ids = [tokenizer.cls_id, *tokenizer.encode_batch([text])[0], tokenizer.sep_id]
        total = 0.0
        for place in range(1, len(ids) - 1):
            row = jnp.asarray([[*ids[:place], tokenizer.mask_id, *ids[place + 1 :]]], jnp.int32)
            embedded = Embeddings(made.config).apply({"params": made.params["embeddings"]}, row)
            logits = Generator(made.config).apply(
                {"params": made.params["generator"]},
                embedded,
                made.params["embeddings"]["word"],
                padding_mask(row >= 0),
            )
            total += float(jax.nn.log_softmax(logits[0, place])[ids[place]])
        np.testing.assert_allclose(found, total, rtol=1e-4)
    expected = model.pseudo_log_likelihood(texts)
    ranked = model.rank(texts, by="pseudo_log_likelihood")
    assert [text for text, _ in ranked] == [texts[n] for n in np.argsort(-expected)]
    with pytest.raises(UserError, match="rank: by originality"):
        model.rank(texts, by="taste")
    with pytest.raises(UserError, match="text 1 is empty"):
        model.pseudo_log_likelihood(["the", ""])
