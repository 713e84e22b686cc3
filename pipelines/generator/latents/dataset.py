"""Cached latents in memory, handed out in training order, one batch ahead of the step that needs it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.storage import Folder
from pipelines.data.labels import STATES, known_labels, label_states
from pipelines.generator.latents.node_cache import read_once
from pipelines.learning.order import Order, batches
from pipelines.tables.parquet import mask_structures, read_table, read_tensors, tensor_columns

AHEAD = 2  # batches prepared before they are asked for


@dataclass(frozen=True)
class Batch:
    """This rank's share of the images at cursors [start, stop)."""

    start: int
    stop: int
    mean: Tensor  # float32 (B, c, h, w)
    logvar: Tensor  # float32 (B, c, h, w)
    given: dict[str, Tensor]  # float32 (B, ...): the conditions by name, labels as 1, 0, or -1 where unknown

    def __len__(self) -> int:
        """Images in all shares."""
        return self.stop - self.start

    def crosses(self, every: int) -> bool:
        """Whether a multiple of `every` images lies in the batch."""
        return self.start // every != self.stop // every


@dataclass(frozen=True)
class LatentSpec:
    """What one image of a latents table has."""

    latent: tuple[int, int, int]  # channels, height, width
    shapes: dict[str, tuple[int, ...]]  # of each condition but the labels
    labels: list[str]  # findings present in the train split
    structures: list[str]  # channels of the mask


def latent_spec(folder: Folder) -> LatentSpec:
    """Read from the columns' types, and from the labels alone."""
    shapes = tensor_columns(folder)
    latent = shapes.pop("latent_mean")
    shapes.pop("latent_logvar")
    labels = known_labels(read_table(folder, ["labels"], "train"))
    return LatentSpec((latent[0], latent[1], latent[2]), shapes, labels, mask_structures(folder))


class Reader:
    """One split of a latents table, with the states of the findings `labels`.

    Args:
        conditions: names of those to read.
        run: the training whose workers share what is read, so that this is a collective; None reads for one process.
    """

    def __init__(self, folder: Folder, seed: int, labels: list[str], conditions: Collection[str],
                 split: str = "train", run: Folder | None = None) -> None:
        columns = ["latent_mean", "latent_logvar", *(name for name in tensor_columns(folder) if name in conditions)]
        wanted = (folder, columns, ["image_id", *STATES], split)
        self.given, table = read_once(run, *wanted) if run else read_tensors(*wanted)
        self.mean, self.logvar = self.given.pop("latent_mean"), self.given.pop("latent_logvar")
        self.image_ids = table["image_id"]
        self.given["labels"] = label_states(table, labels)
        self.seed, self.order = seed, Order(table.num_rows, seed)
        self.waited = 0.0  # seconds that batches() kept its caller waiting

    def ids(self, start: int, stop: int) -> list[str]:
        """image_id at the cursors [start, stop)."""
        order = Order(len(self.image_ids), self.seed)  # `batches` uses the other in its thread
        return self.image_ids.take(order.indices(start, stop)).to_pylist()

    def batches(self, total: int, batch: int, cursor: int, rank: int, world: int, device: str) -> Iterator[Batch]:
        """Batches from `cursor` to `total` images, prepared in a thread; an exception there is raised here."""
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
        stop = threading.Event()
        index = torch.cuda.current_device() if device == "cuda" else None  # a new thread would start at device 0

        def put(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.5)
                except queue.Full:
                    continue

        def prepare() -> None:
            try:
                if index is not None:
                    torch.cuda.set_device(index)
                for start, end in batches(total, batch, cursor):
                    put(self._share(start, end, rank, world, device))
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:
                put(error)

        threading.Thread(target=prepare, daemon=True).start()
        try:
            while True:
                asked = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - asked
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()

    def _share(self, start: int, stop: int, rank: int, world: int, device: str) -> Batch:
        b = stop - start
        rows = self.order.indices(start + rank * b // world, start + (rank + 1) * b // world)
        return Batch(start, stop, *self.rows(rows, device))

    def rows(self, rows: np.ndarray, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Mean and log-variance (B, c, h, w) and the conditions (B, ...) of these images, float32 on the device."""
        def take(array: np.ndarray) -> Tensor:
            host = torch.from_numpy(np.take(array, rows, axis=0))
            return (host.pin_memory() if device == "cuda" else host).to(device, non_blocking=True).float()

        return take(self.mean), take(self.logvar), {name: take(array) for name, array in self.given.items()}
