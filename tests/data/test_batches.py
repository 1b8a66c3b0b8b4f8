import numpy as np
import pytest

from electrax.data.batches import eval_batches, permuted, train_rows


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
