"""Cached latents in memory, handed out in training order, one batch ahead of the step that needs it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.storage import Folder
from pipelines.data.order import Order, batches
from pipelines.data.tables import known_labels, multi_hot, read_tensors

AHEAD = 2  # batches prepared before they are asked for


@dataclass(frozen=True)
class Batch:
    """This rank's share of the images at cursors [start, stop)."""

    start: int
    stop: int
    mean: Tensor  # float32 (B, c, h, w)
    logvar: Tensor  # float32 (B, c, h, w)
    embedding: Tensor  # float32 (B, D)
    labels: Tensor  # float32 (B, L), multi-hot


class Reader:
    """The train split of a latents table."""

    def __init__(self, folder: Folder, seed: int) -> None:
        arrays, table = read_tensors(folder, ["latent_mean", "latent_logvar", "embedding"], ["labels"], "train")
        self.labels = known_labels(table)
        self.mean, self.logvar, self.embedding = arrays["latent_mean"], arrays["latent_logvar"], arrays["embedding"]
        self.hot = multi_hot(table, self.labels)
        self.order = Order(table.num_rows, seed)
        self.waited = 0.0  # seconds that batches() kept its caller waiting

    @property
    def latent(self) -> tuple[int, int, int]:
        channels, height, width = self.mean.shape[1:]
        return channels, height, width

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
        host = [torch.from_numpy(np.take(array, rows, axis=0)) for array in
                (self.mean, self.logvar, self.embedding, self.hot)]
        if device == "cuda":
            host = [tensor.pin_memory() for tensor in host]
        mean, logvar, embedding, labels = (t.to(device, non_blocking=True).float() for t in host)
        return Batch(start, stop, mean, logvar, embedding, labels)
