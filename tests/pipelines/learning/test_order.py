import numpy as np
import pytest

from pipelines.learning.order import Order, WindowedOrder, batches, permutation


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


ROWS = [5, 0, 7, 1, 4, 6, 3, 8, 2, 5]  # images in each shard


def pairs(order: WindowedOrder, start: int, stop: int) -> list[tuple[int, int]]:
    return [(int(shard), int(row)) for shard, row in zip(*order.indices(start, stop), strict=True)]


@pytest.mark.parametrize("window", [1, 3, 9, 100])
def test_every_epoch_of_a_windowed_order_is_a_permutation(window):
    order = WindowedOrder(ROWS, 3, window)
    everything = [(shard, row) for shard, rows in enumerate(ROWS) for row in range(rows)]
    for epoch in range(3):
        assert sorted(pairs(order, epoch * order.n, (epoch + 1) * order.n)) == everything


@pytest.mark.parametrize("cursor", [0, 1, 17, 40, 41, 42, 100])
def test_a_windowed_order_is_a_function_of_the_cursor_alone(cursor):
    whole = pairs(WindowedOrder(ROWS, 7, 3), 0, 130)
    resumed = WindowedOrder(ROWS, 7, 3)
    rest = [pair for ends in batches(130, 16, cursor) for pair in pairs(resumed, *ends)]
    assert rest == whole[cursor:]


def test_no_window_has_more_shards_than_asked_for():
    order = WindowedOrder(ROWS, 5, 4)
    cursor = 0
    while cursor < 2 * order.n:
        window = order.window_at(cursor)
        assert window.start == cursor
        assert len(window.shards) <= 4
        shown = order.indices(window.start, window.stop)[0]
        assert sorted(set(shown.tolist())) == window.shards.tolist()
        cursor = window.stop


def test_windows_differ_by_epoch_and_seed():
    first = pairs(WindowedOrder(ROWS, 0, 3), 0, 41)
    assert first != pairs(WindowedOrder(ROWS, 1, 3), 0, 41)
    assert first != pairs(WindowedOrder(ROWS, 0, 3), 41, 82)


def test_one_window_of_all_shards_gives_the_order_of_a_set_in_memory():
    starts = np.cumsum([0, *ROWS])
    shards, rows = WindowedOrder(ROWS, 11, len(ROWS)).indices(30, 100)
    np.testing.assert_array_equal(starts[shards] + rows, Order(sum(ROWS), 11).indices(30, 100))
