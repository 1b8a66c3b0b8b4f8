"""Decoding against plain loops over tables of numbers, and beam search against all continuations there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.models.decoding import Sampling, beam_search, choose, decode

VOCABULARY, LENGTH, END, FILL = 4, 4, 1, 0


def bigrams(seed: int, rows: int = 3) -> np.ndarray:
    """Logits of the next token, by row, place and token before it."""
    return np.random.RandomState(seed).randn(rows, LENGTH, VOCABULARY, VOCABULARY).astype(np.float32) * 2


def step_of(table: np.ndarray):
    """A step whose cache says which row of the table its own is, so that beams must move it along."""
    given = jnp.asarray(table)

    def step(cache, tokens, place):
        return given[cache, place, tokens], cache

    return step


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum())


def all_continuations(table: np.ndarray, first: int) -> list[tuple[float, tuple[int, ...]]]:
    """(score, tokens) of everything that ends with END or has LENGTH tokens, the best first."""
    found = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        if END in tokens:
            tokens = tokens[: tokens.index(END) + 1]
        before, total = first, 0.0
        for place, token in enumerate(tokens):
            total += log_softmax(table[place, before].astype(np.float64))[token]
            before = token
        found[tokens] = total
    return sorted(((score, tokens) for tokens, score in found.items()), reverse=True)


def test_a_beam_wide_enough_finds_the_best_of_all_continuations():
    table, beams = bigrams(0), VOCABULARY**LENGTH
    first = np.array([2, 3, 2], np.int32)
    search = jax.jit(
        lambda first, cache: beam_search(
            step_of(table), cache, first, LENGTH, END, FILL, beams=beams, n_best=5, length_penalty=0.0
        )
    )
    found = search(first, jnp.repeat(jnp.arange(3), beams))
    for row in range(3):
        expected = all_continuations(table[row], first[row])[:5]
        np.testing.assert_allclose(found.scores[row], [score for score, _ in expected], rtol=1e-5)
        for ids, length, (_, tokens) in zip(found.ids[row], found.lengths[row], expected, strict=True):
            assert tuple(ids[:length].tolist()) == tokens
            assert (ids[length:] == FILL).all()


def test_what_the_cache_says_at_the_end_of_a_continuation_is_added_to_its_score():
    """Each token 2 but the last costs 1.5, which the cache counts."""
    table, beams = bigrams(1), VOCABULARY**LENGTH
    first = np.array([2, 3, 2], np.int32)
    plain = step_of(table)

    def step(cache, tokens, place):
        rows, twos = cache
        return plain(rows, tokens, place)[0], (rows, twos + (tokens == 2))

    search = jax.jit(
        lambda first, rows: beam_search(
            step, (rows, jnp.zeros(len(rows))), first, LENGTH, END, FILL,
            beams=beams, n_best=5, length_penalty=0.0, penalty=lambda cache: -1.5 * cache[1],
        )
    )  # fmt: skip
    found = search(first, jnp.repeat(jnp.arange(3), beams))
    for row in range(3):
        every = [
            (score - 1.5 * (first[row], *tokens[:-1]).count(2), tokens)
            for score, tokens in all_continuations(table[row], first[row])
        ]
        expected = sorted(every, reverse=True)[:5]
        np.testing.assert_allclose(found.scores[row], [score for score, _ in expected], rtol=1e-5)
        for ids, length, (_, tokens) in zip(found.ids[row], found.lengths[row], expected, strict=True):
            assert tuple(ids[:length].tolist()) == tokens


def plain_beam_search(table: np.ndarray, first: int, beams: int, penalty: float) -> tuple[float, tuple[int, ...]]:
    """With lists and no arrays: the `beams` likeliest are kept, what ends among the 2 x beams likeliest counts, and the
    search is over when the likeliest beam would not be the best by ending now."""

    def normalised(total, tokens):
        return total / ((5 + tokens) / 6) ** penalty

    live, ended = [(0.0, ())], []
    for place in range(LENGTH):
        if ended and max(ended)[0] >= normalised(max(live)[0], place + 1):
            break
        grown = []
        for total, tokens in live:
            scores = log_softmax(table[place, tokens[-1] if tokens else first].astype(np.float64))
            grown += [(total + scores[token], (*tokens, token)) for token in range(VOCABULARY)]
        best = sorted(grown, reverse=True)[: 2 * beams]
        over = [each for each in best if each[1][-1] == END or place + 1 == LENGTH]
        ended += [(normalised(total, place + 1), tokens) for total, tokens in over]
        live = [each for each in best if each not in over][:beams]
        if not live:
            break
    return max(ended)


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_beam_is_that_of_a_plain_loop(seed):
    table = bigrams(seed)
    first = np.array([2, 3, 2], np.int32)
    search = jax.jit(
        lambda first, cache: beam_search(step_of(table), cache, first, LENGTH, END, FILL, beams=2, length_penalty=0.6)
    )
    found = search(first, jnp.repeat(jnp.arange(3), 2))
    for row in range(3):
        score, tokens = plain_beam_search(table[row], first[row], 2, 0.6)
        assert tuple(found.ids[row, 0, : found.lengths[row, 0]].tolist()) == tokens
        np.testing.assert_allclose(found.scores[row, 0], score, rtol=1e-5)


def test_a_row_is_done_when_no_beam_would_be_better_by_ending_now_whatever_is_beside_it():
    """The end is likely at once; what follows another token is certain, so that a long continuation would win later."""
    table = np.full((2, LENGTH, VOCABULARY, VOCABULARY), -30.0, np.float32)
    table[0, 0, 2] = np.log([1e-9, 0.6, 1e-9, 0.4 - 2e-9])
    table[0, 1:, :, 3] = 0.0
    table[1, :, :, 3] = 0.0  # never ends
    search = jax.jit(
        lambda rows: beam_search(
            step_of(table), rows, jnp.full(len(rows) // 2, 2), LENGTH, END, FILL, beams=2, length_penalty=2.0
        )
    )
    alone, together = search(jnp.array([0, 0])), search(jnp.array([0, 0, 1, 1]))
    assert alone.ids[0, 0].tolist() == together.ids[0, 0].tolist() == [END, FILL, FILL, FILL]
    assert together.ids[1, 0].tolist() == [3, 3, 3, 3]


def test_greedy_decoding_takes_the_likeliest_token_until_the_end():
    table = bigrams(3)
    first = np.array([2, 3, 2], np.int32)
    found = jax.jit(lambda first, rows: decode(step_of(table), rows, first, LENGTH, END, FILL))(first, jnp.arange(3))
    for row in range(3):
        token, tokens, total = first[row], [], 0.0
        for place in range(LENGTH):
            scores = log_softmax(table[row, place, token])
            token = int(scores.argmax())
            tokens.append(token)
            total += scores[token]
            if token == END:
                break
        assert found.ids[row].tolist() == tokens + [FILL] * (LENGTH - len(tokens))
        assert found.lengths[row] == len(tokens)
        np.testing.assert_allclose(found.scores[row], total, rtol=1e-5)


def test_a_row_is_drawn_by_its_own_key_whatever_rows_are_beside_it():
    table, keys = bigrams(4), jax.random.split(jax.random.key(7), 3)
    sampling, first = Sampling(temperature=1.0), jnp.array([2, 3, 2])

    def draw(rows):
        return decode(step_of(table), rows, first[rows], LENGTH, END, FILL, sampling=sampling, keys=keys[rows])

    together = jax.jit(draw)(jnp.arange(3))
    alone = jax.jit(draw)(jnp.array([2]))
    assert together.ids[2].tolist() == alone.ids[0].tolist()
    assert together.ids.tolist() == jax.jit(draw)(jnp.arange(3)).ids.tolist()


def shares(sampling: Sampling, logits: list[float], seen: list[bool] | None = None, draws: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), draws)
    rows = jnp.tile(jnp.array([logits]), (draws, 1))
    marked = None if seen is None else jnp.tile(jnp.array([seen]), (draws, 1))
    tokens = jax.jit(lambda keys, rows, marked: choose(sampling, keys, rows, marked))(keys, rows, marked)
    return np.bincount(tokens, minlength=len(logits)) / draws


LOGITS = np.log([0.5, 0.3, 0.15, 0.05]).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0]),  # 0.5 alone does not reach it
        (Sampling(temperature=1.0, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_shares(sampling, expected):
    np.testing.assert_allclose(shares(sampling, LOGITS), expected, atol=0.025)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    seen = [True, False, True, False]
    # 2 -> 1 and -1 -> -2, the others stay
    expected = np.exp([1.0, 1.0, -2.0, -1.0])
    found = shares(Sampling(temperature=1.0, repetition_penalty=2.0), [2.0, 1.0, -1.0, -1.0], seen)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.025)


def test_decoding_penalises_the_tokens_that_it_has_written():
    table = np.tile(np.array([0.0, -9.0, 2.0, 1.5], np.float32), (1, LENGTH, VOCABULARY, 1))
    run = jax.jit(
        lambda rows: decode(
            step_of(table), rows, jnp.array([0]), LENGTH, END, FILL, sampling=Sampling(repetition_penalty=2.0)
        )
    )
    assert run(jnp.arange(1)).ids.tolist() == [[2, 3, 2, 2]]  # 2: 2.0, then 3: 1.5 over 2: 1.0, then 1.0 over 0.75
