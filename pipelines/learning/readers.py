"""Data readers of the small networks: images read shard by shard in bounded memory, or an array in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from cluster.session import cores
from cluster.storage import Folder
from pipelines.learning.order import Order, Window, WindowedOrder, batches
from pipelines.tables.images import decode_image
from pipelines.tables.parquet import AHEAD, column_shards, read_ahead, read_split

DECODED_BYTES = 1 << 30  # of decoded images in memory, whatever the size of the set

Part = tuple[Folder, str | None]  # a table and its split, None for all rows


@dataclass(frozen=True)
class Batch:
    """The images at cursors [start, stop)."""

    start: int
    stop: int
    inputs: np.ndarray  # uint8 images (B, 1, H, W), in channels_last memory format; or (B, ...)
    targets: np.ndarray | None  # (B, ...)


class Reader(Protocol):
    """A training set, read in training order."""

    n: int

    def batches(self, total: int, batch: int, cursor: int = 0) -> Iterator[Batch]:
        """Batches from `cursor` to `total` images, repeats counted; a function of these, the set and its seed alone."""


class ArrayReader:
    """A training set in memory.

    Args:
        inputs: (N, ...).
        targets: (N, ...), or None.
        seed: of the order.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray | None, seed: int) -> None:
        self.inputs, self.targets, self.n = inputs, targets, len(inputs)
        self._order = Order(self.n, seed)

    def batches(self, total: int, batch: int, cursor: int = 0) -> Iterator[Batch]:
        for start, stop in batches(total, batch, cursor):
            rows = self._order.indices(start, stop)
            yield Batch(start, stop, self.inputs[rows], _rows_of(self.targets, rows))


class ImageReader:
    """The images of one or several tables, shuffled in windows of shards; the next window is loaded during training.

    A set whose decoded images fit in DECODED_BYTES is one window, decoded once, in the order of `Order`. Of a larger
    set two windows of half that size are in memory.

    Args:
        parts: tables of images of one size, each with its split.
        seed: of the order.
        targets: (N, ...) of all used images, in the order of the parts and their shards; or None.
        used: bool, whether each image of the parts is used; None: all.
    """

    def __init__(self, parts: Sequence[Part], seed: int, targets: np.ndarray | None = None,
                 used: np.ndarray | None = None) -> None:
        counted = [(folder, name, split, table.num_rows) for folder, split in parts
                   for name, table in column_shards(folder, ["split"] if split else ["image_id"], split).items()]
        self._shards = [(folder, name, split) for folder, name, split, _ in counted]
        rows = np.array([count for *_, count in counted], np.int64)
        self._used = None if used is None else np.split(used, np.cumsum(rows)[:-1])
        if self._used is not None:
            rows = np.array([mask.sum() for mask in self._used], np.int64)
        self._starts = np.cumsum(rows) - rows
        self.n, self.targets = int(rows.sum()), targets
        assert targets is None or len(targets) == self.n, f"{len(targets)} targets of {self.n} images"
        self._shape = decode_image(self._encoded(int(np.flatnonzero(rows)[0]))[0]).shape
        image_bytes = int(np.prod(self._shape))
        fits = self.n * image_bytes <= DECODED_BYTES
        self.window = len(rows) if fits else max(1, DECODED_BYTES // 2 // (int(rows.max()) * image_bytes))
        self._order = WindowedOrder(rows.tolist(), seed, self.window)

    def batches(self, total: int, batch: int, cursor: int = 0) -> Iterator[Batch]:
        windows = self._windows(cursor, total)
        window, images = next(windows)
        for start, stop in batches(total, batch, cursor):
            inputs, rows, at = [], [], start
            while at < stop:
                if at == window.stop:
                    window, images = next(windows)
                end = min(stop, window.stop)
                chosen = window.order[at - window.start : end - window.start]
                inputs.append(images[chosen])
                rows.append(self._rows(window)[chosen])
                at = end
            yield Batch(start, stop, np.concatenate(inputs).transpose(0, 3, 1, 2),
                        _rows_of(self.targets, np.concatenate(rows)))

    def _rows(self, window: Window) -> np.ndarray:
        """The row among all images of each image of a window."""
        counts = self._order.shard_rows[window.shards]
        return np.concatenate([start + np.arange(count)
                               for start, count in zip(self._starts[window.shards], counts, strict=True)])

    def _windows(self, cursor: int, total: int) -> Iterator[tuple[Window, np.ndarray]]:
        """Windows from `cursor` on with their decoded images (N, H, W, 1); the next one is loaded in a thread."""
        with ThreadPoolExecutor(1) as loader:
            window = self._order.window_at(cursor)
            images = self._load(window)
            while True:
                following = self._order.window_at(window.stop)
                same = np.array_equal(following.shards, window.shards)
                loading = None if same or window.stop >= total else loader.submit(self._load, following)
                yield window, images
                if window.stop >= total:
                    return
                window = following
                images = loading.result() if loading else images

    def _encoded(self, shard: int) -> pa.ChunkedArray:
        folder, name, split = self._shards[shard]
        images = read_split(folder, name, ["image"], split)["image"]
        return images if self._used is None else images.filter(pa.array(self._used[shard]))

    def _load(self, window: Window) -> np.ndarray:
        counts = self._order.shard_rows[window.shards]
        images = np.empty((int(counts.sum()), *self._shape, 1), np.uint8)
        at = 0

        with ThreadPoolExecutor(cores()) as pool:
            for encoded in read_ahead(self._encoded, window.shards.tolist(), AHEAD):
                for image in pool.map(decode_image, encoded):
                    images[at, ..., 0] = image
                    at += 1
        assert at == len(images), f"{at} images where {len(images)} were counted"
        return images


def _rows_of(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]
