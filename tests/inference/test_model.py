import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.config import UserError
from electrax.data.tokenizer import Tokenizer
from electrax.inference.model import PretrainedModel
from electrax.inference.packing import MOST_TEXTS, pack
from electrax.models.discriminator import Discriminator
from electrax.models.encoder import Embeddings, Encoder, EncoderConfig
from electrax.models.generator import Generator, MaskedLMHead
from electrax.models.masks import padding_mask
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from tests.fixtures.compilations import compilations
from tests.fixtures.types import unchecked_types

LINES = ["the cat sat on the mat", "a dog ran under the red mat", "big cats, small dogs and one blue hat"] * 20
WORDS = " ".join(LINES[:3]).split()
LENGTH, WIDTH = 48, 16


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train("wordpiece", LINES, 80)


def make_model(tokenizer, kind="rtd", shared=True):
    """Both towers with weights drawn at random and made large enough that texts differ."""
    shape = {"vocab_size": tokenizer.vocab_size, "layers": 2, "heads": 2, "max_length": LENGTH}
    discriminator = EncoderConfig(width=WIDTH, feed_forward=32, embedding_width=8, **shape)
    generator = EncoderConfig(width=8, feed_forward=16, embedding_width=8, **shape)
    if kind == "mlm":
        generator = discriminator
    special = SpecialIds(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    task = PretrainTask(ObjectiveConfig(kind=kind), discriminator, generator, special, "packed", shared)
    init = lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 4), np.int32)})  # noqa: E731
    params = jax.jit(lambda: jax.tree.map(lambda p: 3 * p, init()))()
    return PretrainedModel(params, tokenizer, generator, discriminator if kind == "rtd" else None, LENGTH)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def bare(model, text, mask_at=None):
    """(ids, mask) of one text alone, without any padding."""
    ids = [model.tokenizer.cls_id, *model.tokenizer.encode(text)[0], model.tokenizer.sep_id]
    if mask_at is not None:
        ids[mask_at] = model.tokenizer.mask_id
    ids = jnp.asarray([ids], jnp.int32)
    return ids, padding_mask(ids >= 0)


# -- encode -----------------------------------------------------------------------------------------------------------


def test_encode_gives_the_hidden_states_of_the_text_without_padding(model):
    text = "the cat ran"
    ids, mask = bare(model, text)
    embedded = Embeddings(model.discriminator).apply({"params": model.params["embeddings"]}, ids)
    encoder = {"params": model.params["discriminator"]["encoder"]}
    expected = Encoder(model.discriminator).apply(encoder, embedded, mask)
    hidden = model.encode([text])
    assert hidden.shape == (1, ids.shape[1], WIDTH)
    assert hidden.dtype == np.float32
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_encode_gives_zeros_beyond_the_end_of_a_text(model):
    short, long = "cat", "a dog ran under the red mat"
    lengths = [len(model.tokenizer.encode(text)[0]) + 2 for text in (short, long)]
    hidden = model.encode([short, long])
    assert hidden.shape == (2, lengths[1], WIDTH)
    assert (hidden[0, lengths[0] :] == 0).all()
    assert (np.abs(hidden[0, : lengths[0]]).sum(-1) > 0).all()
    assert (np.abs(hidden[1]).sum(-1) > 0).all()


def test_a_text_is_encoded_alike_alone_and_among_others(model):
    texts = [" ".join(["the cat sat", "red", "dog"][: 1 + i % 3] * (1 + i % 4)) for i in range(19)]  # two passes
    together = model.encode(texts)
    for text, row in zip(texts, together, strict=True):
        (alone,) = model.encode([text])
        np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-5)
        assert (row[len(alone) :] == 0).all()


def test_an_empty_text_is_its_two_special_tokens(model):
    assert model.encode([""]).shape == (1, 2, WIDTH)


def test_a_text_that_fills_the_model_is_encoded_and_a_longer_one_refused_or_cut(model):
    full = " ".join(["cat"] * (LENGTH - 2))
    assert len(model.tokenizer.encode(full)[0]) == LENGTH - 2
    assert model.encode([full]).shape == (1, LENGTH, WIDTH)
    with pytest.raises(UserError, match="the text has 47 tokens, but the model takes 46; shorten it or pass truncate"):
        model.encode(["cat", full + " cat"])
    np.testing.assert_allclose(model.encode([full + " dog"], truncate=True), model.encode([full]), atol=1e-6)


def test_no_text_is_an_error(model):
    with pytest.raises(UserError, match="encode: expected at least one text"):
        model.encode([])


def test_what_is_no_text_is_an_error(model):
    message = "^encode: expected text in row 1, found None$"
    with unchecked_types(), pytest.raises(UserError, match=message):
        model.encode(["the cat", None])


def test_one_text_instead_of_a_list_is_an_error(model):
    for pooling in (None, "mean"):
        with pytest.raises(UserError, match="expected a list of texts, not one text"):
            model.encode("the cat", pooling)


# -- one vector a text ------------------------------------------------------------------------------------------------

MIXED = ["cat", "the cat sat on the mat", "", "a dog ran", " ".join(["cat"] * 20), "red", "a " * 46] * 3


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_over_the_hidden_states_of_the_real_tokens(model, pooling):
    found = model.encode(MIXED, pooling)
    assert found.shape == (21, WIDTH) and found.dtype == np.float32
    for text, vector, hidden in zip(MIXED, found, model.encode(MIXED), strict=True):
        real = hidden[: len(model.tokenizer.encode(text)[0]) + 2]
        np.testing.assert_allclose(vector, real.mean(0) if pooling == "mean" else real[0], atol=1e-5)
    assert np.ptp(found[:7], axis=0).min() > 1e-3


def test_a_texts_vector_does_not_depend_on_the_others_nor_on_their_order(model):
    together = model.encode(MIXED, "mean")
    np.testing.assert_allclose(model.encode(MIXED[::-1], "mean")[::-1], together, atol=1e-6, rtol=0)
    for place in (0, 2, 6, 20):
        np.testing.assert_allclose(model.encode([MIXED[place]], "mean")[0], together[place], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", [None, "cls"])
def test_after_warming_up_nothing_is_compiled(tokenizer, pooling):
    model = make_model(tokenizer)
    assert model.warm_up(pooling, longest=20) == 9  # padded to 8, 16 and 24 tokens in three sizes of batches each
    texts = ["cat " * n for n in range(19)]
    with compilations() as found:
        for some in (["cat"], texts[:3], texts * 10, ["cat"] * 300):
            model.encode(some, pooling)
        assert not found
        model.encode(["cat " * 46], pooling)
    assert found


def test_methods_of_one_text_or_of_scores_can_be_compiled_before_too(tokenizer):
    model = make_model(tokenizer)
    lengths = 3  # padded to 8, 16 and 24 tokens
    assert model.warm_up(longest=20, method="fill") == lengths
    assert model.warm_up(longest=20, method="originality") == 3 * lengths
    with compilations() as found:
        for text in ("cat", "cat " * 17):
            model.fill(text + " [MASK]")
            model.detect(text)
            model.originality([text] * 30)
    assert not found
    fresh = make_model(tokenizer)
    assert fresh.warm_up(longest=20, method="detect") == lengths
    with compilations() as found:
        fresh.detect("cat")
    assert not found


def test_what_cannot_be_compiled_before_is_named(tokenizer, model):
    message = "expected the method encode, detect, originality, fill, not 'classify'"
    with unchecked_types(), pytest.raises(UserError, match=message):
        model.warm_up(method="classify")
    with pytest.raises(UserError, match="pooling and packed are for encode, not for detect"):
        model.warm_up("mean", method="detect")
    with pytest.raises(UserError, match="detect: this model was trained with masked LM alone"):
        make_model(tokenizer, "mlm").warm_up(method="detect")


def test_large_calls_in_several_threads_give_each_text_its_own_vectors(model):
    texts = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 7] * (1 + i % 5)) for i in range(400)]
    together = model.encode(texts, "mean")
    for place in range(0, 400, 37):
        np.testing.assert_allclose(model.encode([texts[place]], "mean")[0], together[place], atol=1e-6, rtol=0)


def test_no_text_has_no_vector(model):
    assert model.encode([], "cls").shape == (0, WIDTH)
    assert model.encode([], "mean", packed=True).shape == (0, WIDTH)


# -- several texts in one row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
def test_packed_texts_get_what_they_get_in_rows_of_their_own(model, pooling):
    packed = model.encode(MIXED, pooling, packed=True)
    np.testing.assert_allclose(packed, model.encode(MIXED, pooling), atol=1e-5, rtol=0)


def test_packed_texts_come_in_few_shapes_that_can_be_compiled_before(tokenizer):
    model = make_model(tokenizer)
    assert model.warm_up("mean", packed=True) == 3  # 1, 2 and 10 rows of 48 tokens
    with compilations() as found:
        for some in (["cat"], MIXED, ["cat " * n for n in range(46)] * 10):
            model.encode(some, "mean", packed=True)
    assert not found


def test_packed_texts_of_a_causal_model_see_nothing_of_those_before_them(tokenizer):
    model = make_model(tokenizer, "mlm")
    model = PretrainedModel(model.params, tokenizer, model.generator, None, LENGTH, generator_kind="causal")
    assert model.reads_one_way
    np.testing.assert_allclose(model.encode(MIXED, packed=True), model.encode(MIXED), atol=1e-5, rtol=0)


def test_each_packed_text_goes_where_it_leaves_the_least_room():
    assert pack([3, 6, 5, 2, 4], 10) == [[1, 4], [2, 0, 3]]
    assert pack([4, 10, 6], 10) == [[1], [2, 0]]
    assert pack([], 10) == []


def test_a_row_holds_as_many_packed_texts_as_it_has_vectors():
    rows = pack([2] * 40, 128)
    assert [len(row) for row in rows] == [MOST_TEXTS, MOST_TEXTS, 40 - 2 * MOST_TEXTS]


def test_pooling_refuses_a_text_that_is_too_long_or_cuts_it(model):
    with pytest.raises(UserError, match="the text has 60 tokens, but the model takes 46"):
        model.encode(["cat " * 60], "mean")
    np.testing.assert_array_equal(
        model.encode(["cat " * 60], "mean", truncate=True), model.encode(["cat " * 46], "mean")
    )


def test_another_pooling_is_an_error(model):
    for ask in (model.warm_up, lambda pooling: model.encode(["cat"], pooling)):
        with pytest.raises(UserError, match="encode: expected the pooling mean or cls, not 'max'"):
            ask("max")


def test_a_fine_tuned_encoder_encodes_as_the_pretrained_one_does(model):
    """With the parameters that a fine-tuning task keeps."""
    kept = {
        "embeddings": model.params["embeddings"],
        "discriminator": {"encoder": model.params["discriminator"]["encoder"]},
    }
    encoder = PretrainedModel(kept, model.tokenizer, None, model.discriminator, LENGTH, detects=False)
    np.testing.assert_array_equal(encoder.encode(MIXED[:4], "mean"), model.encode(MIXED[:4], "mean"))
    for ask in (encoder.detect, lambda text: encoder.classify([text], ["red", "blue"])):
        with pytest.raises(UserError, match="this model is an encoder alone, without the discriminator's head"):
            ask("the cat")


# -- detect -----------------------------------------------------------------------------------------------------------


def test_detect_names_every_token_with_its_characters_in_the_text(model):
    text = "The  cat, sat;\tunder THE mats!"
    tokens = model.detect(text)
    assert [t.piece for t in tokens][:3] == ["the", "cat", ","]
    for token in tokens:
        assert token.piece in (
            "[UNK]",
            "##" + text[token.start : token.end].lower(),
            text[token.start : token.end].lower(),
        )
    covered = {i for t in tokens for i in range(t.start, t.end)}
    assert covered == {i for i, c in enumerate(text) if not c.isspace()}


def test_detect_gives_the_discriminators_probability(model):
    text = "a cat sat on the red dog"
    ids, mask = bare(model, text)
    embedded = Embeddings(model.discriminator).apply({"params": model.params["embeddings"]}, ids)
    scores = Discriminator(model.discriminator).apply({"params": model.params["discriminator"]}, embedded, mask)
    found = [token.probability for token in model.detect(text)]
    np.testing.assert_allclose(found, jax.nn.sigmoid(scores)[0, 1:-1], atol=1e-5)
    assert np.ptp(found) > 1e-3


def test_detect_of_nothing_is_nothing(model):
    assert model.detect("") == []


def test_detect_takes_a_mask_in_the_text_for_ordinary_text(model):
    assert model.tokenizer.pieces([model.tokenizer.mask_id])[0] not in [t.piece for t in model.detect("the [MASK] sat")]


def test_detect_refuses_a_text_that_is_too_long(model):
    with pytest.raises(UserError, match="the text has 60 tokens, but the model takes 46"):
        model.detect("cat " * 60)


# -- fill -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_fill_gives_the_generators_likeliest_tokens(tokenizer, shared):
    model = make_model(tokenizer, shared=shared)
    ids, mask = bare(model, "the cat sat", mask_at=2)
    table = model.params["embeddings" if shared else "generator_embeddings"]
    embedded = Embeddings(model.generator).apply({"params": table}, ids)
    logits = Generator(model.generator).apply({"params": model.params["generator"]}, embedded, table["word"], mask)
    expected = np.asarray(jax.nn.softmax(logits[0, 2]))
    (found,) = model.fill("the [MASK] sat", candidates=3)
    best = np.argsort(-expected)[:3]
    assert [c.piece for c in found] == model.tokenizer.pieces(best)
    np.testing.assert_allclose([c.probability for c in found], expected[best], atol=1e-5)


def test_a_hybrid_fills_a_mask_from_the_state_before_it_which_saw_both_sides(tokenizer):
    made = make_model(tokenizer)
    model = PretrainedModel(made.params, tokenizer, made.generator, made.discriminator, LENGTH, generator_kind="hybrid")
    ids, mask = bare(model, "the cat sat", mask_at=2)
    embedded = Embeddings(model.generator).apply({"params": model.params["embeddings"]}, ids)
    hidden = Encoder(model.generator).apply({"params": model.params["generator"]["encoder"]}, embedded, mask)
    head, word = {"params": model.params["generator"]["head"]}, model.params["embeddings"]["word"]
    logits = MaskedLMHead(model.generator).apply(head, hidden[:, 1:2], word)[0, 0, : tokenizer.vocab_size]
    found = model.fill("the [MASK] sat", candidates=tokenizer.vocab_size)[0]
    best = np.argsort(-np.asarray(logits))
    assert [c.piece for c in found[:5]] == tokenizer.pieces(best[:5])
    np.testing.assert_allclose(found[0].probability, jax.nn.softmax(logits)[best[0]], rtol=1e-4)


def test_fill_sorts_the_candidates_of_each_mask_and_their_sum_is_at_most_one(model):
    filled = model.fill("[MASK] cat [MASK] on the mat [MASK]")
    assert [len(candidates) for candidates in filled] == [5, 5, 5]
    for candidates in filled:
        probabilities = [c.probability for c in candidates]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1


def test_all_candidates_together_are_the_vocabulary_and_certain(model):
    (everything,) = model.fill("the [MASK]", candidates=model.tokenizer.vocab_size)
    assert len({c.piece for c in everything}) == model.tokenizer.vocab_size
    assert sum(c.probability for c in everything) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("text", ["the cat sat", "", "the mask"])
def test_fill_without_a_mask_is_an_error(model, text):
    with pytest.raises(UserError, match=r"fill: the text has no \[MASK\]"):
        model.fill(text)


def test_fill_refuses_a_text_that_is_too_long(model):
    with pytest.raises(UserError, match="the text has 61 tokens, but the model takes 46"):
        model.fill("cat " * 60 + "[MASK]")


# -- classify ---------------------------------------------------------------------------------------------------------


def original(model, text, word):
    """Minus the mean of the discriminator's logits at `word`, which is the text's last but for one token."""
    count = len(model.tokenizer.encode(word)[0])
    probabilities = np.array([token.probability for token in model.detect(text)[-1 - count : -1]])
    return -np.mean(np.log(probabilities / (1 - probabilities)))


def test_classify_gives_the_label_whose_word_looks_most_original(model):
    texts, labels = ["the cat sat", "a dog ran under the mat", ""], ["red", "blue", "big hats"]
    found = model.classify(texts, labels, "{text} the hat sat {label},")
    for text, row in zip(texts, found, strict=True):
        logits = [original(model, f"{text} the hat sat {label},", label) for label in labels]
        shares = np.exp(logits) / np.exp(logits).sum()
        assert row["label"] == labels[int(np.argmax(shares))]
        assert row["probabilities"] == pytest.approx(dict(zip(labels, shares.tolist(), strict=True)), abs=1e-4)
        assert row["probability"] == row["probabilities"][row["label"]] and set(row) == {
            "label",
            "probability",
            "probabilities",
        }
    assert np.ptp([row["probabilities"]["red"] for row in found]) > 1e-3


def test_classify_names_the_classes_where_labels_have_words(model):
    by_word = model.classify(["the cat sat"], ["red", "blue"])[0]["probabilities"]
    by_class = model.classify(["the cat sat"], {"+": "red", "-": "blue"})[0]["probabilities"]
    assert by_class == {"+": by_word["red"], "-": by_word["blue"]}


def test_classify_takes_pairs_with_a_template_for_them(model):
    template = "{text}, the {label}, {text2}"
    found = model.classify([("the cat", "a dog ran"), ("a dog ran", "the cat")], ["red", "blue"], template)
    [other] = model.classify(["the cat"], ["red", "blue"], "{text}, the {label}, a dog ran")
    assert found[0]["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    assert found[1]["probabilities"] != pytest.approx(other["probabilities"], abs=1e-6)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("the cat", ["red", "blue"], "classify: expected lists of texts and of labels, not one text or label"),
        (["the cat"], "red", "classify: expected lists of texts and of labels, not one text or label"),
        (["the cat"], ["red"], "labels: expected at least two, not 1"),
        (["the cat"], {"a": "red", "b": ""}, "labels: label 2 is empty; expected a word"),
        ([("the cat", "the dog")], ["red", "blue"], "takes texts: 1, but row 1 has 2"),
    ],
)
def test_classify_refuses_what_it_cannot_fill(model, texts, labels, message):
    with pytest.raises(UserError, match=message):
        model.classify(texts, labels)


def test_an_electric_discriminator_cannot_classify(model):
    electric = PretrainedModel(model.params, model.tokenizer, None, model.discriminator, LENGTH, detects=False)
    with pytest.raises(UserError, match="classify: an Electric discriminator's probabilities need its generator's"):
        electric.classify(["the cat"], ["red", "blue"])


@pytest.mark.parametrize("ask", [lambda m: m.fill("a [MASK]"), lambda m: m.pseudo_log_likelihood(["the cat"]),
                                 lambda m: m.replace(["the cat"])])  # fmt: skip
def test_a_discriminator_alone_predicts_no_token(model, ask):
    alone = PretrainedModel(model.params, model.tokenizer, None, model.discriminator, LENGTH)
    with pytest.raises(UserError, match="this model has no generator"):
        ask(alone)


# -- masked LM alone --------------------------------------------------------------------------------------------------


def test_a_masked_language_model_encodes_and_fills_but_cannot_detect(tokenizer):
    model = make_model(tokenizer, kind="mlm")
    assert model.encode(["the cat"]).shape == (1, 4, WIDTH)
    assert len(model.fill("the [MASK]")) == 1
    assert model.encode(["the cat"], "mean").shape == (1, WIDTH)
    with pytest.raises(UserError, match="detect: this model was trained with masked LM alone and has no discriminator"):
        model.detect("the cat")
    with pytest.raises(
        UserError, match="classify: this model was trained with masked LM alone and has no discriminator"
    ):
        model.classify(["the cat"], ["red", "blue"])


def test_a_causal_language_model_encodes_a_token_from_those_before_it_and_fills_nothing(tokenizer):
    made = make_model(tokenizer, "mlm")
    model = PretrainedModel(made.params, tokenizer, made.generator, None, LENGTH, generator_kind="causal")
    first, other = model.encode(["the cat sat on the mat", "the cat ran"])
    np.testing.assert_allclose(first[:3], other[:3], atol=1e-5)
    assert np.abs(first[3] - other[3]).max() > 0.1
    assert np.abs(made.encode(["the cat ran"])[0, :3] - other[:3]).max() > 0.1
    with pytest.raises(UserError, match="^fill: a causal generator predicts no masked-out tokens$"):
        model.fill("the [MASK] sat")
