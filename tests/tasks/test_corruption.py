import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.tasks.corruption import choose_slots, gumbel, sample, slot_count, write_at

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames=("rows", "mask_prob", "slots", "with_replacement"))
def choose_rows(key, candidates, tokens, *, rows, mask_prob, slots, with_replacement):
    choose = functools.partial(choose_slots, mask_prob=mask_prob, slots=slots, with_replacement=with_replacement)
    return jax.vmap(lambda k: choose(k, candidates, tokens))(jax.random.split(key, rows))


def chosen(candidates, *, rows, mask_prob=0.15, slots, with_replacement=False, tokens=None):
    """Positions [R, M] and used [R, M] of many rows with the same candidates."""
    tokens = jnp.int32(len(candidates) if tokens is None else tokens)
    found = choose_rows(
        KEY,
        jnp.asarray(candidates, bool),
        tokens,
        rows=rows,
        mask_prob=mask_prob,
        slots=slots,
        with_replacement=with_replacement,
    )
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(("length", "mask_prob", "slots"), [(128, 0.15, 19), (512, 0.15, 79), (512, 0.25, 130)])
def test_slots_per_row_are_the_references(length, mask_prob, slots):
    assert slot_count(length, mask_prob) == slots


# tokens · 0.15 is 1.5, 4.5 and 7.5 at 10, 30 and 50 tokens: halves go to the even neighbour
@pytest.mark.parametrize(
    ("tokens", "k"), [(0, 1), (2, 1), (3, 1), (9, 1), (10, 2), (30, 4), (50, 8), (100, 15), (127, 19), (128, 19)]
)
@pytest.mark.parametrize("with_replacement", [False, True])
def test_used_slots_are_the_rounded_share_of_all_tokens(tokens, k, with_replacement):
    _, used = chosen([1] * 128, rows=1, slots=19, tokens=tokens, with_replacement=with_replacement)
    assert used.tolist() == [[True] * k + [False] * (19 - k)]


def test_used_slots_never_exceed_the_slots_of_a_row():
    _, used = chosen([1] * 64, rows=1, mask_prob=0.5, slots=7, tokens=64)
    assert used.sum() == 7


@pytest.mark.parametrize("with_replacement", [False, True])
def test_unused_slots_have_position_zero(with_replacement):
    positions, used = chosen([0] + [1] * 31, rows=50, slots=9, tokens=32, with_replacement=with_replacement)
    assert used.sum(1).tolist() == [5] * 50
    assert (positions[~used] == 0).all() and (positions[used] > 0).all()


@pytest.mark.parametrize("with_replacement", [False, True])
def test_a_row_without_candidates_uses_no_slot(with_replacement):
    positions, used = chosen([0] * 16, rows=3, slots=4, tokens=2, with_replacement=with_replacement)
    assert not used.any() and not positions.any()


def test_without_replacement_a_row_with_fewer_candidates_than_slots_uses_each_once():
    positions, used = chosen([0, 1, 0, 1, 1, 0], rows=20, mask_prob=0.9, slots=5)
    assert used.sum(1).tolist() == [3] * 20
    assert all(sorted(row[use]) == [1, 3, 4] for row, use in zip(positions, used, strict=True))


def test_without_replacement_no_position_comes_twice():
    positions, used = chosen([0] + [1] * 30 + [0], rows=300, mask_prob=0.5, slots=16)
    assert used.all()
    assert all(len(set(row)) == 16 for row in positions.tolist())


@pytest.mark.parametrize("with_replacement", [False, True])
def test_positions_are_uniform_over_the_candidates(with_replacement):
    candidates = np.array([0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1])
    rows, k = 4000, 3
    positions, used = chosen(candidates, rows=rows, mask_prob=0.2, slots=k, with_replacement=with_replacement)
    counts = np.bincount(positions[used], minlength=16)
    assert used.all() and (counts[candidates == 0] == 0).all()
    expected = rows * k / 11
    # chi-square with 10 degrees of freedom exceeds 29.6 once in a thousand draws; the key is fixed
    assert ((counts[candidates == 1] - expected) ** 2 / expected).sum() < 29.6


@pytest.mark.parametrize(("length", "mask_prob", "share"), [(128, 0.15, 0.138), (512, 0.15, 0.140), (512, 0.25, 0.221)])
def test_with_replacement_masks_the_references_share_of_distinct_positions(length, mask_prob, share):
    candidates = [0] + [1] * (length - 2) + [0]
    slots = slot_count(length, mask_prob)
    positions, used = chosen(candidates, rows=51_200 // length, mask_prob=mask_prob, slots=slots, with_replacement=True)
    distinct = [len(set(row[use].tolist())) for row, use in zip(positions, used, strict=True)]
    assert np.mean(distinct) / length == pytest.approx(share, abs=0.001)


def written(ids, positions, values, flags):
    arrays = [jnp.asarray(x, jnp.int32) for x in (ids, positions, values)]
    return write_at(*arrays, jnp.asarray(flags, bool)).tolist()


def test_write_puts_values_at_positions():
    assert written([5, 6, 7, 8], [3, 1], [90, 91], [1, 1]) == [5, 91, 7, 90]


def test_write_at_index_zero_is_discarded():
    assert written([5, 6, 7, 8], [0, 2], [90, 91], [1, 1]) == [5, 6, 91, 8]


def test_write_skips_what_is_not_flagged():
    assert written([5, 6, 7, 8], [3, 1, 2], [90, 91, 92], [0, 1, 0]) == [5, 91, 7, 8]


def test_write_of_a_position_twice_gives_the_floor_of_the_mean():
    assert written([5, 6, 7, 8], [1, 2, 1, 2, 2], [10, 1, 15, 1, 3], [1] * 5) == [5, 12, 1, 8]


def test_write_counts_only_flagged_duplicates():
    assert written([5, 6, 7, 8], [1, 1], [10, 20], [1, 0]) == [5, 10, 7, 8]


def test_gumbel_noise_is_the_references_at_given_uniforms(monkeypatch):
    largest = 1 - 2.0**-24  # the largest uniform float32 below 1
    u = np.array([0.0, 0.1, 0.5, 0.9, largest], np.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.asarray(u).reshape(shape))
    # -ln(-ln(u + 1e-9) + 1e-9); both ends stay finite: -ln(20.7233) and, as 1e-9 vanishes beside u, -ln(6.06e-8)
    expected = [-3.03126, -0.83403, 0.36651, 2.25037, 16.61890]
    np.testing.assert_allclose(gumbel(KEY, (5,)), expected, rtol=2e-5)


def test_gumbel_noise_is_float32_and_a_function_of_uniforms_of_its_key():
    noise = gumbel(KEY, (3, 50))
    u = np.asarray(jax.random.uniform(KEY, (3, 50)), np.float64)
    assert noise.dtype == jnp.float32
    np.testing.assert_allclose(noise, -np.log(-np.log(u + 1e-9) + 1e-9), rtol=1e-4, atol=1e-5)


LOGITS = np.array([1.5, 0.0, -1.0, 0.5, 1.0], np.float32)


WAYS = pytest.mark.parametrize("with_gumbel", [True, False])


def draws(with_gumbel, temperature=1.0, disallow=False, rows=20_000, logits=LOGITS, correct=0):
    tokens = sample(KEY, jnp.tile(logits, (rows, 1)), jnp.full(rows, correct), temperature, disallow, with_gumbel)
    return np.bincount(tokens, minlength=len(logits)) / rows


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@WAYS
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax_of_logits_over_temperature(with_gumbel, temperature):
    rows = 20_000
    p = softmax(LOGITS / temperature)
    # chi-square with 4 degrees of freedom exceeds 18.5 once in a thousand draws; the key is fixed
    assert (rows * (draws(with_gumbel, temperature, rows=rows) - p) ** 2 / p).sum() < 18.5


def test_samples_of_a_vocabulary_of_many_blocks_follow_the_softmax():
    logits = 0.5 * np.random.RandomState(0).standard_normal(300).astype(np.float32)
    rows, p = 20_000, softmax(logits.astype(np.float64))
    assert (rows * p).min() > 5  # so that the sum below is chi-square of 299 degrees of freedom: 299 ± 24
    assert (rows * (draws(False, rows=rows, logits=logits) - p) ** 2 / p).sum() < 379


def test_a_token_is_the_first_up_to_which_the_softmax_sums_to_more_than_the_uniform_of_its_key():
    logits = np.asarray(4 * jax.random.normal(jax.random.key(5), (400, 700)))
    u = np.asarray(jax.random.uniform(KEY, (400,)), np.float64)
    sums = np.cumsum([softmax(row) for row in logits.astype(np.float64) / 0.7], axis=-1)
    found = np.asarray(sample(KEY, jnp.asarray(logits), jnp.zeros(400, int), 0.7))
    expected = np.array([np.searchsorted(row, x, side="right") for row, x in zip(sums, u, strict=True)])
    at_edge = np.abs(sums - u[:, None]).min(axis=1) < 1e-5  # where float32 may decide otherwise
    assert at_edge.sum() < 40 and found[~at_edge].tolist() == expected[~at_edge].tolist()


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_the_least_and_the_greatest_uniform_give_tokens_that_can_be(monkeypatch, u):
    """After 200 tokens that cannot be come 5 that can, and 200 more that cannot."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u))
    lowest = np.full(200, np.finfo(np.float32).min)
    logits = np.concatenate([lowest, LOGITS, lowest]).astype(np.float32)
    assert sample(KEY, jnp.asarray(logits[None]), jnp.zeros(1, int)).tolist() == [200 if u == 0 else 204]


def test_with_gumbel_a_sample_is_the_arg_max_of_scaled_logits_plus_the_noise_of_its_key():
    logits = np.asarray(jax.random.normal(jax.random.key(5), (40, 30)))
    u = np.asarray(jax.random.uniform(KEY, (40, 30)))
    expected = np.argmax(logits / 0.7 - np.log(-np.log(u + 1e-9) + 1e-9), axis=-1)
    assert sample(KEY, jnp.asarray(logits), jnp.zeros(40, int), 0.7, with_gumbel=True).tolist() == expected.tolist()


def test_temperature_zero_is_the_arg_max():
    assert draws(False, 0.0, rows=50).tolist() == [1, 0, 0, 0, 0]


@WAYS
def test_disallow_correct_never_samples_the_true_token_and_leaves_the_rest_in_proportion(with_gumbel):
    rows = 20_000
    found = draws(with_gumbel, disallow=True, rows=rows)
    p = softmax(LOGITS[1:])
    assert found[0] == 0
    assert (rows * (found[1:] - p) ** 2 / p).sum() < 16.3  # 3 degrees of freedom, one in a thousand


def test_disallow_correct_works_on_the_arg_max_too():
    assert draws(False, 0.0, True, rows=3).tolist() == [0, 0, 0, 0, 1]


# 1000 comes off after the division by T: 900 / 0.5 - 1000 = 800 > 0, but 900 - 1000 < 0; and 1100 - 1000 > 0
@WAYS
@pytest.mark.parametrize(("logit", "temperature", "token"), [(900, 0.5, 0), (900, 1.0, 1), (1100, 1.0, 0)])
def test_disallow_correct_takes_a_thousand_from_the_scaled_logit(with_gumbel, logit, temperature, token):
    logits = np.array([logit, 0, -2000], np.float32)
    assert draws(with_gumbel, temperature, True, rows=20, logits=logits)[token] == 1


@WAYS
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_the_lowest_float32_is_never_sampled_at_any_temperature(with_gumbel, temperature):
    logits = np.array([0, 0, np.finfo(np.float32).min, np.finfo(np.float32).min], np.float32)
    assert draws(with_gumbel, temperature, logits=logits)[2:].tolist() == [0, 0]
    # not even where every other token is the forbidden one
    assert draws(with_gumbel, temperature, True, logits=logits, correct=1)[2:].tolist() == [0, 0]
