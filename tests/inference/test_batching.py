import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from electrax.config import UserError
from electrax.inference.batching import (
    LADDER,
    PASS,
    TOKENS,
    by_length,
    compiled,
    pad,
    padded_length,
    row_counts,
    run,
    run_by_length,
    use_batch_tokens,
    warm_up,
)


@pytest.mark.parametrize(
    ("length", "padded"),
    [
        (0, 8),
        (8, 8),
        (9, 16),
        (33, 40),
        (65, 72),
        (127, 128),
        (129, 160),
        (512, 512),
        (513, 1024),
        (1024, 1024),
        (1025, 1536),
    ],
)
def test_a_length_is_padded_to_the_next_of_few(length, padded):
    assert padded_length(length) == padded


def test_an_accelerator_has_fewer_lengths(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [padded_length(length) for length in (1, 33, 128, 129, 257, 513)] == [32, 64, 128, 192, 384, 1024]


def test_a_length_has_three_sizes_of_batches():
    found = {length: row_counts(length, 512) for length in (8, 64, 96, 128, 512, 1024)}
    assert found == {8: [1, 16, 64], 64: [1, 2, 8], 96: [1, 5], 128: [1, 4], 512: [1, 2], 1024: [1, 2]}


def test_a_large_batch_has_the_tokens_that_are_chosen():
    def largest():
        return max(len(numbers) * length for numbers, length in by_length([16] * 100, streams=1))

    assert largest() == TOKENS
    try:
        use_batch_tokens(64)
        assert largest() == 64
    finally:
        use_batch_tokens(0)
    assert largest() == TOKENS
    with pytest.raises(UserError, match="batch_tokens must not be negative, but is -1"):
        use_batch_tokens(-1)


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_batches_hold_every_row_once_and_long_ones_first(count):
    lengths = np.random.RandomState(count).randint(1, 700, count).tolist()
    seen, order = [], []
    for numbers, length in by_length(lengths, 512, 2):
        real = numbers[numbers >= 0]
        assert len(real) > 0 and padded_length(max(lengths[number] for number in real)) == length
        assert len(numbers) in row_counts(length, 512)
        seen += real.tolist()
        order += [lengths[number] for number in real]
    assert sorted(seen) == list(range(count)) and order == sorted(order, reverse=True)


def test_no_other_cut_costs_less():
    """Of all cuts of few rows, by trying them."""
    lengths = [120, 70, 64, 64, 30, 9, 8, 3, 3]
    batches = list(by_length(lengths, 256, 1))
    cost = sum(len(numbers) * length + PASS for numbers, length in batches)
    costs = []
    for sizes in itertools.product(range(3), repeat=len(lengths)):
        place = total = 0
        for size in sizes:
            if place < len(lengths):
                length = padded_length(lengths[place])
                counts = row_counts(length, 256)
                total += counts[min(size, len(counts) - 1)] * length + PASS
                place += counts[min(size, len(counts) - 1)]
        costs.append(total)
    assert cost == min(costs)


def test_rows_that_make_no_large_batch_for_each_stream_come_in_small_ones():
    assert [len(numbers) for numbers, _ in by_length([64] * 16, 512, 2)] == [8, 8]
    assert [len(numbers) for numbers, _ in by_length([64] * 16, 512, 3)] == [2] * 8
    assert [len(numbers) for numbers, _ in by_length([64], 512, 2)] == [1]


def test_most_of_the_tokens_of_many_rows_are_real():
    lengths = np.random.RandomState(0).randint(20, 129, 512)
    assert lengths.sum() > 0.92 * sum(len(numbers) * length for numbers, length in by_length(lengths.tolist(), 512, 2))


def test_nothing_makes_no_batch():
    assert list(by_length([])) == []


def test_rows_are_filled_up_and_minus_one_is_a_row_of_nothing_else():
    out = pad([[1, 2], [3], [4, 5, 6]], np.array([2, -1, 0]), 4, 9)
    assert out.tolist() == [[4, 5, 6, 9], [9, 9, 9, 9], [1, 2, 9, 9]] and out.dtype == np.int32


def test_batches_run_beside_each_other_and_come_in_order(monkeypatch):
    monkeypatch.setattr("electrax.inference.batching.at_a_time", lambda: 2)
    both = threading.Barrier(2, timeout=60)
    assert list(run(lambda x: (both.wait(), x)[1], range(6))) == list(range(6))


def test_one_batch_runs_in_the_thread_that_asks():
    assert list(run(lambda _: threading.current_thread(), [0])) == [threading.current_thread()]


def test_what_fails_in_a_batch_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(run(lambda x: 1 // x, [1, 0, 1]))


def test_a_large_batch_on_one_core_gives_what_all_cores_give():
    function = lambda params, ids: jnp.tanh(params[ids] @ params.T)  # noqa: E731
    params = jnp.asarray(np.random.RandomState(0).normal(size=(50, 32)), jnp.float32)
    ids = np.random.RandomState(1).randint(0, 50, (TOKENS // 16, 16))
    np.testing.assert_allclose(compiled(function)(params, ids), function(params, ids), atol=1e-6)


@pytest.mark.parametrize(("most", "longest"), [(100, None), (20, None), (2000, 60), (1100, None)])
def test_warming_up_meets_every_shape_that_rows_come_in(most, longest):
    shapes, known = set(), []

    def forward(ids):
        known.append(ids.shape) if warming else shapes.add(ids.shape)
        return jnp.zeros(len(ids))

    warming = True
    assert warm_up(forward, 1, most, longest) == len(known) == len(set(known))
    warming = False
    random = np.random.RandomState(0)
    for count in (1, 2, 3, 5, 9, 30, 200, 1000):
        for top in {min(most, longest or most), *LADDER[:3]}:
            rows = [[1] * n for n in random.randint(0, min(top, most, longest or most) + 1, count)]
            assert sum(len(numbers) for numbers, _ in run_by_length(forward, [(rows, 0)], most)) == count
    assert shapes <= set(known)
