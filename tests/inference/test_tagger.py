import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.inference.tagger import Entity, Tagger
from electrax.models.encoder import EncoderConfig
from electrax.tasks.tag import TagTask
from tests.fixtures.compilations import compilations
from tests.fixtures.types import unchecked_types
from tests.fixtures.weights import random_params

LINES = ["the cat sat on the mat", "a dog ran under the red mat", "big cats, small dogs and one blue hat"] * 20
MAX_LENGTH = 20  # between two lengths that batches are padded to
WORDS = ["the", "big", "cat", "ran", "under", "mat"]
TAGS = ("B-ANIMAL", "E-ANIMAL", "I-ANIMAL", "O", "S-ANIMAL")
BEGIN, END, OUT, SINGLE = 0, 1, 3, 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train("wordpiece", LINES, 80)


@pytest.fixture(scope="module")
def tagger(tokenizer):
    """A head that is solved for, so that it says B E O O O S of WORDS, each with probability e⁵ / (e⁵ + 4)."""
    encoder = EncoderConfig(
        vocab_size=tokenizer.vocab_size, layers=1, width=32, heads=2, feed_forward=32, embedding_width=8,
        max_length=MAX_LENGTH,
    )  # fmt: skip
    task = TagTask(encoder, tokenizer.pad_id, tokenizer.sep_id, tags=TAGS, scheme="IOB2", max_length=MAX_LENGTH)
    ids = np.array([[tokenizer.cls_id, *tokenizer.encode(" ".join(WORDS))[0], tokenizer.sep_id]])
    assert ids.shape == (1, 8)
    params = random_params(jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": ids})))
    hidden = np.asarray(jax.jit(task.hidden)(params, jnp.asarray(ids)))[0, 1:-1].astype(np.float64)
    kernel = np.linalg.lstsq(hidden, 5.0 * np.eye(5)[[BEGIN, END, OUT, OUT, OUT, SINGLE]], rcond=None)[0]
    params["head"]["output"] = {"kernel": jnp.float32(kernel), "bias": jnp.zeros(5)}
    return Tagger(params, tokenizer, task, MAX_LENGTH)


def test_every_word_gets_its_tag_in_the_scheme_of_the_data_with_its_probability(tagger):
    tagged = tagger.tag(WORDS)
    assert [word.word for word in tagged] == WORDS
    assert [word.tag for word in tagged] == ["B-ANIMAL", "I-ANIMAL", "O", "O", "O", "B-ANIMAL"]
    assert [word.probability for word in tagged] == pytest.approx([np.exp(5) / (np.exp(5) + 4)] * 6, rel=1e-3)


def test_entities_are_spans_of_words_with_their_text(tagger):
    assert tagger.entities(WORDS) == [Entity("ANIMAL", 0, 2, "the big"), Entity("ANIMAL", 5, 6, "mat")]


def test_plain_tags_have_no_entities(tagger, tokenizer):
    plain = dataclasses.replace(tagger.task, scheme=None, tags=("ADJ", "DET", "NOUN", "PUNCT", "VERB"))
    other = Tagger(tagger.params, tokenizer, plain, MAX_LENGTH)
    assert [word.tag for word in other.tag(WORDS)] == ["ADJ", "DET", "PUNCT", "PUNCT", "PUNCT", "VERB"]
    with pytest.raises(UserError, match="mark no spans"):
        other.entities(WORDS)


def test_a_sentence_gets_the_same_tags_in_any_company(tagger):
    sentences = [WORDS, ["cat"], [], WORDS[:3] * 9, WORDS[::-1], ["mat", "hat"]]
    together = tagger.tag_batch(sentences)
    assert [len(tagged) for tagged in together] == [6, 1, 0, 27, 6, 2]
    for words, tagged in zip(sentences, together, strict=True):
        alone = tagger.tag(words)
        assert [word[:2] for word in alone] == [word[:2] for word in tagged]
        assert [word.probability for word in alone] == pytest.approx([word.probability for word in tagged], rel=1e-3)


def test_a_sentence_of_500_words_gets_500_tags(tagger):
    words = [WORDS[i % 6] for i in range(500)]
    tagged = tagger.tag(words)
    assert [word.word for word in tagged] == words
    assert all(0 < word.probability <= 1 for word in tagged)


def test_the_tags_of_a_long_sentence_are_those_of_its_parts(tagger):
    """18 words fit into a row; rows hold 0-17, 9-26 and 18-29, of which 0-12, 13-21 and 22-29 count."""
    words = [WORDS[i % 6] for i in range(30)]
    [whole] = tagger.log_probs([words])
    first, second, third = tagger.log_probs([words[:18], words[9:27], words[18:]])
    np.testing.assert_allclose(whole, np.concatenate([first[:13], second[4:13], third[4:]]), rtol=1e-3, atol=1e-3)


def test_words_that_the_tokenizer_does_not_know_or_drops_get_a_tag(tagger):
    words = ["\U0001f600", "日本語", "", "\u200b", "cat", "x" * 400]
    assert [word.word for word in tagger.tag(words)] == words


def test_after_warming_up_nothing_is_compiled(tagger, tokenizer):
    fresh = Tagger(tagger.params, tokenizer, tagger.task, MAX_LENGTH)
    assert fresh.warm_up(longest=8) == 3
    fresh.warm_up()
    with compilations() as found:
        for sentences in ([WORDS], [WORDS[:n] for n in range(7)] * 50, [WORDS * 5]):
            fresh.log_probs(sentences)
    assert not found


def test_nothing_gives_nothing(tagger):
    assert tagger.tag_batch([]) == [] and tagger.tag([]) == [] and tagger.entities([]) == []


@pytest.mark.parametrize("word, found", [(None, "None"), (3, "3"), ("\ud83d", "half a surrogate pair")])
def test_a_word_that_is_no_text_is_an_error(tagger, word, found):
    message = f"^tag: expected text in sentence 1, place 1, found {found}$"
    with unchecked_types(), pytest.raises(UserError, match=message):
        tagger.tag_batch([["the", "cat"], ["the", word]])


def test_a_text_in_place_of_words_is_an_error(tagger):
    for call, given in ((tagger.tag, "the cat"), (tagger.tag_batch, "the cat"), (tagger.tag_batch, ["the cat"])):
        with pytest.raises(UserError, match="a list of words"):
            call(given)
