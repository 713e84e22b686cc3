import numpy as np
import pytest

from pipelines.learning.order import Order, batches, permutation


@pytest.mark.parametrize("n", [1, 2, 97])
def test_every_epoch_is_a_permutation(n):
    order = Order(n, seed=3)
    for epoch in range(4):
        assert sorted(order.indices(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_two_epochs_show_each_image_exactly_twice():
    order = Order(50, seed=0)
    seen = np.concatenate([order.indices(*ends) for ends in batches(100, 16)])
    assert np.bincount(seen, minlength=50).tolist() == [2] * 50


@pytest.mark.parametrize("cursor", [0, 1, 49, 50, 51, 99, 120])
def test_a_run_resumed_at_any_cursor_sees_what_is_left(cursor):
    whole = Order(50, seed=7).indices(0, 150)
    resumed = Order(50, seed=7)
    rest = [resumed.indices(*ends) for ends in batches(150, 32, cursor)]
    np.testing.assert_array_equal(np.concatenate(rest), whole[cursor:])


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_a_batch_without_overlap(workers):
    """Each worker takes its stretch of every batch; together they see what one would."""
    one, many = Order(30, seed=1), [Order(30, seed=1) for _ in range(workers)]
    for start, stop in batches(64, 16):
        share = (stop - start) // workers
        parts = [order.indices(start + k * share, start + (k + 1) * share) for k, order in enumerate(many)]
        np.testing.assert_array_equal(np.concatenate(parts), one.indices(start, stop))


def test_a_range_longer_than_an_epoch_and_an_empty_one():
    assert len(Order(5, seed=0).indices(3, 23)) == 20
    assert Order(5, seed=0).indices(4, 4).shape == (0,)


def test_order_differs_by_epoch_and_seed():
    assert not np.array_equal(permutation(100, 0, 0), permutation(100, 0, 1))
    assert not np.array_equal(permutation(100, 0, 0), permutation(100, 1, 0))
    assert not np.array_equal(permutation(100, 0, 1), permutation(100, 1, 0))
    np.testing.assert_array_equal(permutation(100, 5, 6), permutation(100, 5, 6))


@pytest.mark.parametrize(("total", "batch", "cursor", "expected"), [
    (10, 4, 0, [(0, 4), (4, 8), (8, 10)]),
    (8, 4, 0, [(0, 4), (4, 8)]),
    (10, 4, 6, [(6, 10)]),
    (10, 4, 10, []),
    (3, 4, 0, [(0, 3)]),
])
def test_batches_cover_the_rest_once(total, batch, cursor, expected):
    assert list(batches(total, batch, cursor)) == expected
