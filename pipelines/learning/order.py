"""The order in which training sees images: a function of (seed, epoch, cursor) and of nothing else.

Every epoch is one permutation of the whole set. The cursor counts images, so a run resumes at any cursor with any
number of workers and sees exactly the images not yet seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order of `n` images in one epoch, int64 (n,)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


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


def batches(total: int, batch: int, cursor: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of cursors [start, stop) from `cursor` to `total`; the last may be short."""
    while cursor < total:
        stop = min(cursor + batch, total)
        yield cursor, stop
        cursor = stop


def step_seed(seed: int, cursor: int) -> int:
    """Seed of all randomness of the step at `cursor` images: a resumed run draws what an unbroken one does."""
    return int(np.random.SeedSequence([seed, cursor]).generate_state(1, np.uint64)[0] >> 1)
