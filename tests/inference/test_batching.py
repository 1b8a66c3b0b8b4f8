import numpy as np
import pytest

from electrax.inference.batching import by_length, pad, padded_length


@pytest.mark.parametrize(
    ("length", "padded"),
    [(0, 8), (1, 8), (8, 8), (9, 16), (33, 48), (129, 192), (512, 512), (513, 1024), (1024, 1024), (1025, 1536)],
)
def test_a_length_is_padded_to_the_next_of_few(length, padded):
    assert padded_length(length) == padded


def test_batches_hold_every_row_once_and_short_ones_first():
    lengths = np.random.RandomState(0).randint(1, 700, 300).tolist()
    seen, order = [], []
    for numbers, length in by_length(lengths):
        real = numbers[numbers >= 0]
        assert all(padded_length(lengths[number]) == length for number in real)
        assert real.tolist() == sorted(real.tolist()) and len(real) > 0
        seen += real.tolist()
        order.append(length)
    assert sorted(seen) == list(range(300)) and order == sorted(order)


def test_a_length_has_one_shape_of_about_as_many_tokens_as_asked_for():
    shapes = {length: len(numbers) for numbers, length in by_length([5, 600, 12, 20, 30, 6, 2000] * 20)}
    assert shapes == {8: 128, 16: 64, 24: 42, 32: 32, 1024: 1, 2048: 1}
    assert {length: len(numbers) for numbers, length in by_length([5, 12], tokens=16)} == {8: 2, 16: 1}


def test_the_last_batch_of_a_length_is_filled_with_minus_one():
    found = [(numbers.tolist(), length) for numbers, length in by_length([8, 20, 3, 5], tokens=16)]
    assert found == [([0, 2], 8), ([3, -1], 8), ([1], 24)]


def test_nothing_makes_no_batch():
    assert list(by_length([])) == []


def test_rows_are_filled_up_and_minus_one_is_a_row_of_nothing_else():
    out = pad([[1, 2], [3], [4, 5, 6]], np.array([2, -1, 0]), 4, 9)
    assert out.tolist() == [[4, 5, 6, 9], [9, 9, 9, 9], [1, 2, 9, 9]] and out.dtype == np.int32
