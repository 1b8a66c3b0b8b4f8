import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from electrax.data.batches import LengthBuckets, PairBuckets, bucket_lengths, eval_batches, permuted, train_rows


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 17, 100, 1023, 1024, 1025])
def test_permuted_is_a_bijection_of_every_size(size):
    for epoch in range(3):
        assert sorted(permuted(np.arange(size), size, (7, epoch)).tolist()) == list(range(size))


def test_permuted_depends_on_the_index_alone_not_on_its_neighbours():
    whole = permuted(np.arange(1000), 1000, (1, 2))
    assert permuted(np.array([999, 3, 3]), 1000, (1, 2)).tolist() == whole[[999, 3, 3]].tolist()


def test_permuted_works_on_sizes_that_no_array_could_have():
    size = 10**12 + 39
    rows = permuted(np.array([0, 1, size - 1]), size, (0, 0))
    assert len(set(rows.tolist())) == 3 and rows.min() >= 0 and rows.max() < size


def test_permuted_is_uniform_over_orders_and_places():
    orders = [tuple(permuted(np.arange(3), 3, (0, epoch)).tolist()) for epoch in range(600)]
    assert all(60 <= orders.count(order) <= 140 for order in set(orders)) and len(set(orders)) == 6
    firsts = np.array([permuted(np.array([0]), 1000, (seed, 0))[0] for seed in range(400)])
    assert abs(firsts.mean() - 499.5) < 4 * 1000 / np.sqrt(12 * 400)


def test_each_epoch_sees_each_row_once_in_an_order_of_its_own():
    stream = np.concatenate([train_rows(step, 4, 10, seed=3) for step in range(5)])
    first, second = stream[:10].tolist(), stream[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_rows_of_a_step_do_not_depend_on_the_batch_size_before_it():
    small = np.concatenate([train_rows(step, 3, 10, seed=3) for step in range(8)])
    large = np.concatenate([train_rows(step, 12, 10, seed=3) for step in range(2)])
    assert small.tolist() == large.tolist()


def test_a_batch_may_hold_several_epochs():
    assert sorted(train_rows(0, 6, 2, seed=0).tolist()) == [0, 0, 0, 1, 1, 1]


def test_another_seed_gives_another_order():
    assert train_rows(0, 100, 100, seed=0).tolist() != train_rows(0, 100, 100, seed=1).tolist()


def test_eval_batches_cover_each_row_once_and_fill_the_last_with_minus_one():
    assert [b.tolist() for b in eval_batches(5, 2)] == [[0, 1], [2, 3], [4, -1]]
    assert [b.tolist() for b in eval_batches(4, 2)] == [[0, 1], [2, 3]]
    assert list(eval_batches(0, 2)) == []


# -- rows of different lengths ----------------------------------------------------------------------------------------


def padding(lengths, buckets):
    """Tokens added when each row is padded to the next bucket."""
    return sum(min(bucket for bucket in buckets if bucket >= length) - length for length in lengths)


@pytest.mark.parametrize(
    ("most", "buckets"),
    [(1, [10]), (2, [1, 10]), (3, [1, 6, 10]), (4, [1, 5, 6, 10]), (9, [1, 5, 6, 10])],
)
def test_the_buckets_of_a_few_lengths_are_those_found_by_hand(most, buckets):
    # of two, {1, 10} leaves 5 + 4 = 9 tokens, {5, 10} 4 + 4 + 4 = 12 and {6, 10} 5 + 5 + 1 = 11
    assert bucket_lengths(np.array([6, 1, 10, 1, 5]), most).tolist() == buckets


@hypothesis.given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5))
@hypothesis.settings(max_examples=150, deadline=None)
def test_no_other_buckets_leave_less_padding(lengths, most):
    found = bucket_lengths(np.array(lengths), most).tolist()
    values = sorted(set(lengths))
    choices = (c for n in range(min(most, len(values))) for c in itertools.combinations(values[:-1], n))
    assert found == sorted(set(found)) and len(found) <= most and set(found) <= set(values)
    assert padding(lengths, found) == min(padding(lengths, (*choice, values[-1])) for choice in choices)


LENGTHS = np.random.RandomState(0).geometric(0.05, 103) + 2  # five whole batches of 20 and three rows


def epoch(buckets, number, seed):
    return [buckets.train_rows(number * buckets.batches + place, seed) for place in range(buckets.batches)]


def test_an_epoch_of_buckets_has_each_row_once_and_fills_one_batch_with_minus_one():
    buckets = LengthBuckets(LENGTHS, 20, 4)
    assert buckets.batches == 6
    orders = []
    for number in range(3):
        batches = epoch(buckets, number, seed=0)
        rows = np.concatenate([rows for rows, _ in batches])
        orders.append(rows.tolist())
        assert all(len(rows) == 20 for rows, _ in batches)
        assert np.sort(rows).tolist() == [-1] * 17 + list(range(103))
        assert sum(-1 in rows for rows, _ in batches) == 1
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6])
def test_batches_have_the_lengths_with_which_rows_in_order_of_length_are_padded_least(most):
    """The fewest of them that leave less than 8 % padding."""
    longest = [sorted(LENGTHS)[min(end, 103) - 1] for end in range(20, 121, 20)]  # of six batches in order of length
    rows = np.repeat(longest, [20] * 5 + [3]).tolist()
    for count in range(1, most + 1):
        choices = itertools.combinations(longest[:-1], count - 1)
        padded = sum(rows) + min(padding(rows, (*choice, longest[-1])) for choice in choices)
        if LENGTHS.sum() > 0.92 * padded:
            break
    batches = epoch(LengthBuckets(LENGTHS, 20, most), 0, seed=0)
    assert len({length for _, length in batches}) == count
    assert sum(length * int((rows >= 0).sum()) for rows, length in batches) == padded
    assert all(length >= LENGTHS[rows[rows >= 0]].max() for rows, length in batches)


def test_lengths_of_batches_are_multiples_where_they_are_asked_for():
    batches = epoch(LengthBuckets(LENGTHS, 20, 4, multiple=16), 0, seed=0)
    assert {length % 16 for _, length in batches} == {0} and len({length for _, length in batches}) > 1
    assert all(length >= LENGTHS[rows[rows >= 0]].max() for rows, length in batches)


def test_a_target_of_multiples_has_one_token_more_than_is_predicted():
    lengths = np.array([[3, 5], [20, 17], [9, 18], [4, 2]])
    found = [pair for _, pair in PairBuckets(lengths, 1, 12, multiple=16).eval_rows()]
    assert sorted(found) == [(16, 17), (16, 17), (16, 33), (32, 17)]


def test_the_length_of_a_batch_does_not_depend_on_the_seed_but_its_rows_do():
    buckets = LengthBuckets(LENGTHS, 20, 4)
    lengths = [[length for _, length in epoch(buckets, number, seed)] for seed in (0, 7) for number in (0, 1)]
    assert lengths[:2] == lengths[2:] and lengths[0] != lengths[1]
    assert sorted(lengths[0]) == sorted(lengths[1])
    assert any((a != b).any() for (a, _), (b, _) in zip(epoch(buckets, 0, 0), epoch(buckets, 0, 7), strict=True))


def test_batches_of_buckets_are_a_function_of_seed_and_step_alone():
    buckets, later = LengthBuckets(LENGTHS, 20, 4), LengthBuckets(LENGTHS, 20, 4)
    straight = {(seed, step): buckets.train_rows(step, seed) for seed in (0, 1) for step in range(20)}
    for (seed, step), (rows, length) in reversed(straight.items()):  # also steps of many epochs in turn
        again = later.train_rows(step, seed)
        assert again[0].tolist() == rows.tolist() and again[1] == length


def test_rows_that_are_nearly_one_length_are_drawn_together_anew_each_epoch():
    buckets = LengthBuckets(np.full(40, 7), 20)
    first, second = (sorted(epoch(buckets, number, seed=0)[0][0].tolist()) for number in (0, 1))
    assert first != second and set(first) != set(range(20))


def test_an_evaluation_in_buckets_has_each_row_once_and_short_rows_first():
    found = list(LengthBuckets(LENGTHS, 20, 4).eval_rows())
    assert np.sort(np.concatenate([rows for rows, _ in found])).tolist() == [-1] * 17 + list(range(103))
    lengths = [length for _, length in found]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1


def test_the_padding_share_counts_the_tokens_of_real_rows():
    # in order of length {2, 2}, {2, 5} and {6}: of two lengths, 2 and 6 leave 1 + 4 and 5 and 6 leave 3 + 3 + 3
    buckets = LengthBuckets(np.array([2, 6, 2, 5, 2]), 2, 2)
    assert buckets.buckets.tolist() == [2, 6]
    assert buckets.padding_share() == pytest.approx(1 - 17 / (2 + 2 + 6 + 6 + 6))
    assert LengthBuckets(np.array([2, 6, 2, 5, 2]), 2, 3).padding_share() == pytest.approx(1 - 17 / (2 + 2 + 5 + 5 + 6))
    assert LengthBuckets(np.array([4, 4, 4]), 2).padding_share() == 0.0


def test_one_length_does_where_it_pads_less_than_8_percent():
    assert LengthBuckets(np.array([23, 25, 25, 25]), 1).buckets.tolist() == [25]  # 2 of 100
    assert LengthBuckets(np.array([17, 25, 25, 25]), 1).buckets.tolist() == [17, 25]  # 8 of 100


def test_rows_fewer_than_a_batch_make_one_batch():
    buckets = LengthBuckets(np.array([3, 5]), 4)
    rows, length = buckets.train_rows(0, seed=0)
    assert sorted(rows.tolist()) == [-1, -1, 0, 1] and length == 5 and buckets.batches == 1
