"""Encoded images streamed into training, in an order that is a function of seed and cursor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from pipelines.generator.latents.dataset import SMALL, LatentArrays, LatentBatch, columns_of
from pipelines.generator.latents.feed import StreamPlan
from pipelines.generator.latents.spec import LatentSpec
from pipelines.learning.order import WindowedOrder, batches, share
from pipelines.learning.prefetch import Prefetcher
from pipelines.tables.parquet import read_split, shard_name, tensors


class StreamReader:
    """The train split, as streamed by the feed.

    A global batch holds the images of `WindowedOrder` at its cursors, sorted by window, shard and row, so that a rank's
    share lies in few shards: every encoded shard is sent to about one rank, whatever the number of ranks.

    Args:
        feed: handle of the actor; see `pipelines.generator.latents.feed`.
        conditions: names of the conditions to return.
    """

    def __init__(self, plan: StreamPlan, feed: Any, spec: LatentSpec, conditions: Collection[str]) -> None:
        self.plan, self.feed, self.spec = plan, feed, spec
        self.columns = columns_of(spec, conditions)
        self._order = plan.order()
        self._shards: dict[tuple[int, int], LatentArrays] = {}  # by window and shard
        self._prefetcher: Prefetcher[LatentBatch] = Prefetcher()

    @property
    def waited(self) -> float:
        return self._prefetcher.waited

    def ids(self, start: int, stop: int) -> list[str]:
        _, shards, rows = locate(self.plan.order(), start, stop)  # `self._order` is used in the prefetch thread
        ids = {shard: read_split(self.plan.images, shard_name(shard), ["image_id"], "train")["image_id"]
                 for shard in set(shards.tolist())}
        return [ids[shard][row].as_py() for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]

    def batches(self, total: int, batch: int, cursor: int, rank: int, world: int, device: str) -> Iterator[LatentBatch]:
        def shares() -> Iterator[LatentBatch]:
            for start, stop in batches(total, batch, cursor):
                yield self._read(start, stop, share(stop - start, rank, world), rank, device)

        return self._prefetcher.iterate(shares)

    def _read(self, start: int, stop: int, own: slice, rank: int, device: str) -> LatentBatch:
        windows, shards, rows = (column[own] for column in locate(self._order, start, stop))
        parts = []
        for window, shard in dict.fromkeys(zip(windows.tolist(), shards.tolist(), strict=True)):
            chosen = rows[(windows == window) & (shards == shard)]
            parts.append(self._shard(rank, window, shard).rows(chosen, device))
        last = int(windows[-1])
        self._shards = {key: shard for key, shard in self._shards.items() if key[0] >= last}
        means, logvars, conditions = zip(*parts, strict=True)
        return LatentBatch(start, stop, torch.cat(means), torch.cat(logvars) if self.spec.logvar else None,
                     {name: torch.cat([part[name] for part in conditions]) for name in conditions[0]})

    def _shard(self, rank: int, window: int, shard: int) -> LatentArrays:
        if (window, shard) not in self._shards:
            import ray

            [block] = ray.get(self.feed.shard.remote(rank, window, shard))
            table = ray.get(block)
            assert table["shard"][0].as_py() == shard, f"shard {table['shard'][0]} instead of {shard}"
            self._shards[window, shard] = LatentArrays({name: tensors(table, name) for name in self.columns},
                                                  table.select(SMALL), self.spec.labels)
        return self._shards[window, shard]


def locate(order: WindowedOrder, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Window start, shard and row of the images at cursors [start, stop), int64 each, sorted by all three."""
    shards, rows = order.indices(start, stop)
    windows, at = [], start
    while at < stop:
        window = order.window_at(at)
        end = min(stop, window.stop)
        windows.append(np.full(end - at, window.start, np.int64))
        at = end
    window_of = np.concatenate(windows)
    sorting = np.lexsort((rows, shards, window_of))
    return window_of[sorting], shards[sorting], rows[sorting]
