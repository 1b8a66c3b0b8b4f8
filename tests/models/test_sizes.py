import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from electrax.config import UserError, find_config, load
from electrax.experiment.config import PretrainConfig, computed_in
from electrax.models.encoder import EncoderConfig
from electrax.models.flops import encoder_forward, paper_step, pretraining_step
from electrax.models.sizes import GeneratorConfig, ModelConfig, discriminator_shape, generator_shape
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds

VOCABULARY, PADDED = 30522, 30592


def towers(model=None, generator=None, vocab_size=VOCABULARY):
    model = model or ModelConfig()
    discriminator = discriminator_shape(model, vocab_size)
    return generator_shape(model, generator or GeneratorConfig(), discriminator), discriminator


def shape(c):
    return c.layers, c.width, c.feed_forward, c.heads, c.embedding_width


# layers, width, feed-forward, heads, embedding width
@pytest.mark.parametrize(
    ("size", "discriminator", "generator"),
    [
        ("tiny", (3, 128, 512, 2, 128), (3, 64, 256, 1, 128)),
        ("small", (12, 256, 1024, 4, 128), (12, 64, 256, 1, 128)),
        ("base", (12, 768, 3072, 12, 768), (12, 256, 1024, 4, 768)),
        ("large", (24, 1024, 4096, 16, 1024), (24, 256, 1024, 4, 1024)),
        ("small++", (12, 256, 1024, 4, 128), (12, 256, 1024, 4, 128)),
    ],
)
def test_sizes_are_the_papers(size, discriminator, generator):
    found = towers(ModelConfig(size=size))
    assert shape(found[1]) == discriminator and shape(found[0]) == generator
    assert all((c.max_length, c.dropout, c.attention_dropout, c.body) == (512, 0.1, 0.1, "electra") for c in found)


def test_a_changed_width_brings_heads_feed_forward_and_tied_embeddings_with_it():
    assert shape(towers(ModelConfig(size="base", width=128))[1]) == (12, 128, 512, 2, 128)
    assert shape(towers(ModelConfig(size="small", width=32))[1]) == (12, 32, 128, 1, 128)


def test_generator_fractions_are_rounded_and_heads_are_at_least_one():
    generator = GeneratorConfig(width_fraction=0.1, layers_fraction=0.4)
    assert shape(towers(generator=generator)[0]) == (5, 26, 104, 1, 128)  # 25.6 and 4.8


def test_separate_embeddings_are_as_wide_as_the_generator():
    assert towers(generator=GeneratorConfig(embeddings="separate"))[0].embedding_width == 64


def test_a_two_tower_generator_has_the_fractions_of_a_masked_one():
    assert shape(towers(generator=GeneratorConfig(kind="two_tower"))[0]) == (12, 64, 256, 1, 128)


def test_a_shared_generator_is_the_discriminator_and_takes_no_numbers_of_its_own():
    generator, discriminator = towers(generator=GeneratorConfig(kind="shared"))
    assert generator == discriminator
    with pytest.raises(UserError) as caught:
        towers(generator=GeneratorConfig(kind="shared", width=64, layers_fraction=0.5, embeddings="separate"))
    assert str(caught.value) == (
        'generator.kind "shared" is the discriminator\'s own encoder; leave out generator.layers_fraction, '
        "generator.width, generator.embeddings"
    )


# share predicted, row length, rows, learning rate, steps, and tokens in all (the paper's table 6 and 7)
@pytest.mark.parametrize(
    ("name", "mask_prob", "length", "rows", "rate", "steps", "tokens"),
    [
        ("small", 0.15, 128, 128, 5e-4, 1_000_000, 16.4e9),
        ("base", 0.15, 512, 256, 2e-4, 766_000, 100e9),
        ("large", 0.25, 512, 2048, 2e-4, 400_000, 419e9),
        ("small++", 0.15, 512, 128, 5e-4, 4_000_000, 262e9),
    ],
)
def test_shipped_configs_have_the_papers_numbers(name, mask_prob, length, rows, rate, steps, tokens):
    c = load(PretrainConfig, find_config(name, "pretrain"), ["--workdir", "runs/any"])
    found = c.objective.mask_prob, c.data.max_length, c.batch_size, c.optimizer.learning_rate, c.steps
    assert found == (mask_prob, length, rows, rate, steps)
    assert (c.model.size, c.optimizer.warmup_steps, c.data.vocab_size) == (name, 10_000, VOCABULARY)
    assert length * rows * steps == pytest.approx(tokens, rel=0.005)


def test_numbers_that_do_not_fit_name_their_section():
    with pytest.raises(UserError, match=r"\[model\] width 100"):
        discriminator_shape(ModelConfig(width=100, heads=3), VOCABULARY)
    with pytest.raises(UserError, match=r"\[generator\] width 30"):
        towers(generator=GeneratorConfig(width=30, heads=4))


@functools.cache
def counts(size, kind="masked"):
    generator, discriminator = towers(ModelConfig(size=size), GeneratorConfig(kind=kind))
    special = SpecialIds(0, 1, 2, 3)
    task = PretrainTask(ObjectiveConfig(), discriminator, generator, special, "packed", generator_kind=kind)
    tree = jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 8), np.int32)}))
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in tree.items()}


# by hand, with the vocabulary of 30,522 as it is: tables (30522 + 512 + 2) · E + 2E for the norm; a projection
# E · D + D; a layer 4(D² + D) + 2DF + F + D + 4D; the heads D² + D + D + 1 and D · E + E + 2E + 30522
@pytest.mark.parametrize(
    ("size", "embeddings", "encoder", "head", "generator"),
    [
        ("small", 3_972_864, 33_024 + 12 * 789_760, 66_049, 8_256 + 12 * 49_984 + 39_098),
        ("base", 23_837_184, 12 * 7_087_872, 591_361, 196_864 + 12 * 789_760 + 229_434),
        ("large", 31_782_912, 24 * 12_596_224, 1_050_625, 262_400 + 24 * 789_760 + 295_738),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(size, embeddings, encoder, head, generator):
    width = {"small": 128, "base": 768, "large": 1024}[size]
    padding = PADDED - VOCABULARY  # rows of the word table, and entries of the output bias
    found = counts(size)
    assert found == {
        "embeddings": embeddings + padding * width,
        "discriminator": encoder + head,
        "generator": generator + padding,
    }
    # the released encoders: 13.5, 108.9 and 334.1 million
    assert embeddings + encoder == {"small": 13_483_008, "base": 108_891_648, "large": 334_092_288}[size]


def test_parameter_counts_of_the_other_generators():
    padding = PADDED - VOCABULARY
    # two encoders, each with its projection, and twice the rows of the head's dense layer
    two = 2 * (8_256 + 12 * 49_984) + 39_098 + 64 * 128 + padding
    assert counts("small", "two_tower")["generator"] == two
    shared = counts("small", "shared")
    assert shared["generator"] == 256 * 128 + 128 + 2 * 128 + VOCABULARY + padding  # a head alone
    assert shared["discriminator"] == counts("small")["discriminator"]


def test_flops_of_a_step_are_three_forwards_of_matrix_products():
    generator, discriminator = towers(
        ModelConfig(layers=1, width=8, heads=1, feed_forward=16, embedding_width=8),
        GeneratorConfig(width=4, layers=1, heads=1),
        vocab_size=128,
    )
    # a token in rows of 10: qkv and output 8D², scores and mixing 4LD, feed-forward 4DF, head 2D² + 2D
    encoder = 8 * 64 + 4 * 10 * 8 + 4 * 8 * 16
    small = 2 * 8 * 4 + 8 * 16 + 4 * 10 * 4 + 4 * 4 * 16  # with its projection from 8 to 4
    slot = 2 * 4 * 8 + 2 * 8 * 128
    expected = 3 * 6 * (10 * (encoder + 2 * 64 + 2 * 8) + 10 * small + 2 * slot)
    assert pretraining_step(generator, discriminator, rows=6, length=10, slots=2) == expected
    # a gate is a third product
    gated = dataclasses.replace(discriminator, body="modern")
    more = pretraining_step(generator, gated, 6, 10, 2) - expected
    assert more == 3 * 6 * 10 * 2 * 8 * 16
    # a second encoder, and a head over both states; then the vocabulary at all ten places
    two = pretraining_step(generator, discriminator, 6, 10, 2, towers=2)
    assert two - expected == 3 * 6 * (10 * small + 2 * 2 * 4 * 8)
    assert pretraining_step(generator, discriminator, 6, 10, 10, towers=2) - two == 3 * 6 * 8 * (slot + 2 * 4 * 8)
    # GPT-2's head is the vocabulary alone
    bare = dataclasses.replace(discriminator, body="gpt2")
    assert pretraining_step(bare, None, 6, 10, 2) == 3 * 6 * (10 * encoder + 2 * 2 * 8 * 128)
    # the discriminator's own encoder, run twice
    head = 2 * 8 * 8 + 2 * 8 * 128
    shared = 3 * 6 * (10 * (2 * encoder + 2 * 64 + 2 * 8) + 2 * head)
    assert pretraining_step(discriminator, discriminator, 6, 10, 2) == shared


@pytest.mark.parametrize(
    "size, rows, length, steps, published",
    [
        ("small", 128, 128, 1_000_000, 1.29e18),
        ("base", 256, 512, 766_000, 6.42e19),
        ("large", 2048, 512, 400_000, 7.12e20),
        ("large", 2048, 512, 1_750_000, 3.11e21),
    ],
)
def test_the_papers_count_is_what_the_reference_prints(size, rows, length, steps, published):
    generator, discriminator = towers(ModelConfig(size=size), GeneratorConfig())
    if size == "base":  # the script takes 256, one third
        assert generator.width == 256
    assert steps * paper_step(generator, discriminator, rows, length) == pytest.approx(published, rel=5e-3)


def test_the_papers_count_of_a_masked_lm_alone():
    _, small = towers(ModelConfig(size="small"), GeneratorConfig())
    assert 1.45e6 * paper_step(small, None, 128, 128) == pytest.approx(1.42e18, rel=5e-3)


@pytest.mark.parametrize(
    "size, length, slots, discriminator, generator, slot",
    [
        # by hand, in MFLOP forward: layers x (24 D² + 4 L D) + projection + head of a token; what a slot costs
        ("small", 128, 19, 12 * 1.703936 + 0.197120, 12 * 0.131072 + 0.016384, 7.848),
        ("base", 512, 79, 12 * 15.728640 + 1.181184, 12 * 2.097152 + 0.393216, 47.382528),
        ("large", 512, 130, 24 * 27.262976 + 2.099200, 24 * 2.097152 + 0.524288, 63.176704),
    ],
)  # fmt: skip
def test_matrix_flops_of_a_token_are_those_worked_out_by_hand(size, length, slots, discriminator, generator, slot):
    a_token = 3 * (discriminator + generator + slots / length * slot)
    found = pretraining_step(*towers(ModelConfig(size=size)), 1, length, slots) / length / 1e6
    assert found == pytest.approx(a_token, rel=1e-4)
    assert found == pytest.approx({"small": 70.2, "base": 668.4, "large": 2169.8}[size], rel=1e-3)


def test_where_the_last_layer_gives_one_tokens_state_the_products_of_the_others_are_not_counted():
    """By hand, width 4, feed-forward 8, rows of 10: of a token and layer 96 for queries, keys and values, 160 for
    scores and their sums, 32 for the output and 128 for the feed-forward; of the last layer nine tenths of the 320 are
    left out.
    """
    small = EncoderConfig(vocab_size=9, layers=2, width=4, heads=2, feed_forward=8, embedding_width=4)
    assert encoder_forward(small, 10) == 2 * (96 + 320)
    assert encoder_forward(small, 10, first=1) == pytest.approx(2 * (96 + 320) - 288)
    assert encoder_forward(small, 10, first=20) == 2 * (96 + 320)


def test_attention_of_a_gpu_is_refused_for_a_type_or_a_width_that_it_has_not():
    assert discriminator_shape(ModelConfig(attention="cudnn", compute_dtype="bfloat16"), VOCABULARY).heads == 4
    with pytest.raises(UserError, match=r"\[model\] attention cudnn needs .*, not float32 and 64"):
        discriminator_shape(ModelConfig(attention="cudnn"), VOCABULARY)
    with pytest.raises(UserError, match="not bfloat16 and 4"):
        discriminator_shape(ModelConfig(attention="cudnn", compute_dtype="bfloat16", width=16, heads=4), VOCABULARY)
    with pytest.raises(UserError, match=r"fused needs .* 16 or a larger power of two, not bfloat16 and 48"):
        discriminator_shape(ModelConfig(attention="fused", compute_dtype="bfloat16", width=96, heads=2), VOCABULARY)


@pytest.mark.parametrize("attention", ["cudnn", "fused"])
def test_a_model_trained_with_attention_of_a_gpu_computes_without_it_where_there_is_none(attention):
    trained = PretrainConfig(workdir="w", steps=1, model=ModelConfig(attention=attention, compute_dtype="bfloat16"))
    assert computed_in(trained, None).model == ModelConfig(compute_dtype="bfloat16")
    assert computed_in(trained, "float32").model == ModelConfig()
