"""The order in which training sees images: a function of (seed, epoch, cursor) only.

Every epoch is one permutation of the data set. The cursor counts images, so that a run resumes at any cursor with any
number of workers and sees exactly the remaining images. `Order` is for a set in memory; `WindowedOrder` is for a set
read shard by shard, and shuffles as many shards at a time as fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def permutation(n: int, *seed: int) -> np.ndarray:
    """Order of `n` images, int64 (n,); of one epoch for the seed (seed, epoch)."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(n)


class Order:
    """Indices of the images at any range of cursors; keeps the permutations of the two epochs a batch can touch."""

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0, "an order needs at least one image"
        self.n, self.seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Images at cursors [start, stop), int64 (stop - start,)."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.n)
            take = min(stop - start, self.n - offset)
            parts.append(self._epoch(epoch)[offset : offset + take])
            start += take
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs[epoch] = permutation(self.n, self.seed, epoch)
        return self._epochs[epoch]


@dataclass(frozen=True)
class Window:
    """Shards that are shuffled together, and the order of their images at cursors [start, stop)."""

    start: int
    stop: int
    shards: np.ndarray  # int64, ascending
    order: np.ndarray  # int64 (stop - start,), indices into the concatenated shards


class WindowedOrder:
    """Shard and row of the images at any range of cursors, if only a window of shards fits in memory.

    Every epoch distributes the shards at random over windows of at most `window` shards (equal in number, up to one)
    and shuffles the images of each window. A single window of all shards gives the order of `Order`.

    Args:
        shard_rows: images in each shard; 0 is allowed.
        seed: of all permutations.
        window: shards in memory at a time.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, window: int) -> None:
        self.shard_rows = np.asarray(shard_rows, np.int64)
        self.n = int(self.shard_rows.sum())
        assert self.n > 0, "an order needs at least one image"
        assert window > 0, "a window holds at least one shard"
        self.seed = seed
        self._filled = np.flatnonzero(self.shard_rows)
        self._count = -(-len(self._filled) // window)  # windows in an epoch
        self._last: Window | None = None

    def window_at(self, cursor: int) -> Window:
        """The window that the image at `cursor` belongs to."""
        if self._last is None or not self._last.start <= cursor < self._last.stop:
            self._last = self._window(*divmod(cursor, self.n))
        return self._last

    def indices(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard, and row of that shard, of the images at cursors [start, stop), int64 (stop - start,) each."""
        shards, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        while start < stop:
            window = self.window_at(start)
            end = min(stop, window.stop)
            chosen = window.order[start - window.start : end - window.start]
            starts = np.cumsum(self.shard_rows[window.shards]) - self.shard_rows[window.shards]
            shard_index = np.searchsorted(starts, chosen, "right") - 1
            shards.append(window.shards[shard_index])
            rows.append(chosen - starts[shard_index])
            start = end
        return np.concatenate(shards), np.concatenate(rows)

    def _window(self, epoch: int, offset: int) -> Window:
        if self._count == 1:
            return Window(epoch * self.n, (epoch + 1) * self.n, self._filled, permutation(self.n, self.seed, epoch))
        windows = np.array_split(self._filled[permutation(len(self._filled), self.seed, epoch)], self._count)
        stops = np.cumsum([self.shard_rows[shards].sum() for shards in windows])
        k = int(np.searchsorted(stops, offset, "right"))
        shards, rows = np.sort(windows[k]), int(self.shard_rows[windows[k]].sum())
        stop = epoch * self.n + int(stops[k])
        return Window(stop - rows, stop, shards, permutation(rows, self.seed, epoch, 1 + k))


def batches(total: int, batch: int, cursor: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of cursors [start, stop) from `cursor` to `total`; the last may be short."""
    while cursor < total:
        stop = min(cursor + batch, total)
        yield cursor, stop
        cursor = stop


def share(batch: int, rank: int, world: int) -> slice:
    """The part of a global batch of `batch` images that belongs to a rank."""
    return slice(rank * batch // world, (rank + 1) * batch // world)


def step_seed(seed: int, cursor: int) -> int:
    """Seed of all randomness of the step at `cursor` images, so that a resumed run draws the same numbers."""
    return int(np.random.SeedSequence([seed, cursor]).generate_state(1, np.uint64)[0] >> 1)
