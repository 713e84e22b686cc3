"""Encoded images: cached latents in training order, and a sample to validate on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.storage import Folder
from pipelines.data.labels import STATE_COLUMNS, label_states
from pipelines.generator.latents.node_cache import read_cached
from pipelines.generator.latents.spec import LatentSpec
from pipelines.generator.settings import CONDITIONS
from pipelines.learning.order import Order, batches, share
from pipelines.learning.prefetch import Prefetcher
from pipelines.tables.draw import draw_rows
from pipelines.tables.parquet import read_tensors, tensors

SMALL = ("image_id", *STATE_COLUMNS)  # columns that are not tensors


@dataclass(frozen=True)
class LatentBatch:
    """This rank's share of the images at cursors [start, stop)."""

    start: int
    stop: int
    mean: Tensor  # float32 (B, c, h, w)
    logvar: Tensor | None  # float32 (B, c, h, w); None if only means are stored
    conditions: dict[str, Tensor]  # float32 (B, ...) by name; labels are 1, 0, or -1 (unknown)

    def __len__(self) -> int:
        """Images of the global batch."""
        return self.stop - self.start

    def crosses(self, every: int) -> bool:
        """Whether a multiple of `every` images lies in the batch."""
        return self.start // every != self.stop // every


class LatentReader(Protocol):
    """Encoded images of the train split in training order."""

    @property
    def waited(self) -> float:
        """Seconds that the caller of `batches` has waited for data."""

    def ids(self, start: int, stop: int) -> list[str]:
        """image_id of the images at cursors [start, stop)."""

    def batches(self, total: int, batch: int, cursor: int, rank: int, world: int, device: str) -> Iterator[LatentBatch]:
        """This rank's share of the batches from `cursor` to `total` images."""


def columns_of(spec: LatentSpec, conditions: Collection[str]) -> list[str]:
    """The tensor columns of latents and these conditions."""
    return ["latent_mean", *(["latent_logvar"] if spec.logvar else []),
            *(name for name in spec.shapes if name in conditions)]


class LatentArrays:
    """Encoded images, in memory or memory-mapped.

    Args:
        arrays: by column, (N, ...).
        table: SMALL columns of the same rows.
        labels: findings whose states are returned.
    """

    def __init__(self, arrays: dict[str, np.ndarray], table: pa.Table, labels: list[str]) -> None:
        self.mean, self.logvar = arrays["latent_mean"], arrays.get("latent_logvar")
        self.conditions = {name: array for name, array in arrays.items() if not name.startswith("latent_")}
        self.conditions["labels"] = label_states(table, labels)
        self.image_ids = table["image_id"]

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, rows: np.ndarray, device: str) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Mean and log-variance (B, c, h, w) and the conditions (B, ...) of these images, float32 on the device."""
        def take(array: np.ndarray) -> Tensor:
            host = torch.from_numpy(np.take(array, rows, axis=0))
            return (host.pin_memory() if device == "cuda" else host).to(device, non_blocking=True).float()

        return take(self.mean), None if self.logvar is None else take(self.logvar), {
            name: take(array) for name, array in self.conditions.items()}


class CachedReader:
    """The train split of a latents table, in memory or memory-mapped from the node's cache.

    Args:
        conditions: names of the conditions to read.
        cache: folder shared by this node's workers; None: this process reads for itself.
    """

    def __init__(self, folder: Folder, spec: LatentSpec, seed: int, conditions: Collection[str],
                 cache: Path | None = None) -> None:
        columns = columns_of(spec, conditions)
        arrays, table = read_cached(cache, folder, columns, SMALL, "train") if cache \
            else read_tensors(folder, columns, SMALL, "train")
        self.encoded = LatentArrays(arrays, table, spec.labels)
        self.seed, self.order = seed, Order(len(self.encoded), seed)
        self._prefetcher: Prefetcher[LatentBatch] = Prefetcher()

    @property
    def waited(self) -> float:
        return self._prefetcher.waited

    def ids(self, start: int, stop: int) -> list[str]:
        order = Order(len(self.encoded), self.seed)  # `self.order` is used in the prefetch thread
        return self.encoded.image_ids.take(order.indices(start, stop)).to_pylist()

    def batches(self, total: int, batch: int, cursor: int, rank: int, world: int, device: str) -> Iterator[LatentBatch]:
        def shares() -> Iterator[LatentBatch]:
            for start, stop in batches(total, batch, cursor):
                own = share(stop - start, rank, world)
                rows = self.order.indices(start + own.start, start + own.stop)
                yield LatentBatch(start, stop, *self.encoded.rows(rows, device))

        return self._prefetcher.iterate(shares)


def draw_val_images(folder: Folder, spec: LatentSpec, images: int, seed: int) -> LatentArrays:
    """A random sample of the val split with all conditions, stratified by source."""
    columns = columns_of(spec, CONDITIONS)
    table = draw_rows(folder, images, seed, [*columns, *SMALL], "val")
    return LatentArrays({name: tensors(table, name) for name in columns}, table, spec.labels)
