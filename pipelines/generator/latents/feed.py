"""Streams images into training with Ray Data: read, augmented and encoded by an actor pool, in window order.

One actor, the feed, runs the pipeline and holds references to the encoded shards of at most two windows; the data stay
in the object stores of the nodes that encoded them. This bounds the read-ahead, whatever the size of the data set.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.storage import Folder
from pipelines.generator.latents.encode import EncodeImages, EncodingSpec, ReadImages
from pipelines.learning.order import WindowedOrder, step_seed

WINDOWS = 2  # held at a time
SHARDS = 4_096  # processed by one Ray Data pipeline before the next starts


@dataclass(frozen=True)
class StreamPlan:
    """The parameters of the feed.

    Args:
        images: the table of clean images.
        encoding: the networks, and what is stored for an image.
        rows: images of the train split in each shard.
        seed: of the order and the augmentation.
        window: shards in a shuffle window.
        augment: whether to apply small random shifts, scalings and exposure changes, different in every epoch.
        actors: number of encoding actors.
        ray_options: of each encoding actor.
        reserved: CPUs and GPUs held by the training workers.
    """

    images: Folder
    encoding: EncodingSpec
    rows: tuple[int, ...]
    seed: int
    window: int
    augment: bool
    actors: int
    ray_options: dict[str, Any]
    reserved: dict[str, float]

    def order(self) -> WindowedOrder:
        return WindowedOrder(self.rows, self.seed, self.window)


class Feed:
    """A Ray actor that distributes encoded shards to the training workers; its methods are asynchronous."""

    def __init__(self, plan: StreamPlan, cursor: int, total: int, world: int) -> None:
        self.plan, self.cursor, self.total, self.world = plan, cursor, total, world
        self._blocks: dict[int, dict[int, Any]] = {}  # window start -> shard -> object reference
        self._at: dict[int, int] = {}  # rank -> window it last asked for a shard of
        self._error: BaseException | None = None
        self._changed: asyncio.Condition | None = None

    async def start(self) -> None:
        """Start streaming; returns immediately."""
        self._changed = asyncio.Condition()
        threading.Thread(target=self._run, args=(asyncio.get_running_loop(),), daemon=True).start()

    async def shard(self, rank: int, window: int, shard: int) -> list[Any]:
        """A reference to an encoded shard of the window that starts at cursor `window`.

        It is in a list because Ray would resolve a bare reference. Windows that all ranks have left are released.
        """
        assert self._changed is not None, "the feed was not started"
        async with self._changed:
            self._at[rank] = window
            if len(self._at) == self.world:
                for start in [start for start in self._blocks if start < min(self._at.values())]:
                    del self._blocks[start]
                self._changed.notify_all()
            await self._changed.wait_for(lambda: self._error or shard in self._blocks.get(window, {}))
            if self._error:
                raise RuntimeError(f"images could not be streamed: {self._error}") from self._error
            return [self._blocks[window][shard]]

    async def held(self) -> int:
        """Number of windows with shards in memory."""
        return len(self._blocks)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            for window, shard, block in encoded_shards(self.plan, self.cursor, self.total):
                asyncio.run_coroutine_threadsafe(self._put(window, shard, block), loop).result()
        except BaseException as error:
            asyncio.run_coroutine_threadsafe(self._fail(error), loop).result()

    async def _put(self, window: int, shard: int, block: Any) -> None:
        """Store a block; waits while WINDOWS other windows are held."""
        assert self._changed is not None
        async with self._changed:
            await self._changed.wait_for(lambda: window in self._blocks or len(self._blocks) < WINDOWS)
            self._blocks.setdefault(window, {})[shard] = block
            self._changed.notify_all()

    async def _fail(self, error: BaseException) -> None:
        assert self._changed is not None
        async with self._changed:
            self._error = error
            self._changed.notify_all()


def encoded_shards(plan: StreamPlan, cursor: int, total: int) -> Iterator[tuple[int, int, Any]]:
    """(start of its window, shard number, object reference) of each encoded shard, in window order from `cursor` on."""
    order, ahead = plan.order(), np.zeros((0, 2), np.int64)
    while cursor < total or len(ahead):
        while cursor < total and len(ahead) < SHARDS:
            window = order.window_at(cursor)
            ahead = np.concatenate([ahead, np.stack([np.full(len(window.shards), window.start), window.shards], 1)])
            cursor = window.stop
        for (start, shard), block in zip(ahead.tolist(), _encode(plan, ahead), strict=True):
            yield start, shard, block
        ahead = ahead[:0]


def _encode(plan: StreamPlan, window_shards: np.ndarray) -> Iterator[Any]:
    """Object references of the encoded shards, for rows (window, shard) of `window_shards` (N, 2), in their order."""
    import ray.data
    from ray.data import ActorPoolStrategy, ExecutionResources

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a shard stays one block
    context.execution_options.preserve_order = True
    context.execution_options.exclude_resources = ExecutionResources(**plan.reserved)
    data = ray.data.from_arrow([pa.table({"window": [window], "shard": [shard]})
                                for window, shard in window_shards.tolist()])
    operators: list[tuple[Any, dict[str, Any]]] = [(_Read(plan), {"num_cpus": 0.25})]
    if plan.augment:
        operators.append((Augment(plan.seed), {"num_cpus": 0.25}))
    operators.append((EncodeImages, {"compute": ActorPoolStrategy(size=plan.actors), **plan.ray_options}))
    for operator, arguments in operators:
        data = data.map_batches(operator, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **arguments)
    for bundle in data.iter_internal_ref_bundles():
        yield from bundle.block_refs


class _Read:
    """Ray Data operator: (window, shard) to the decoded images of the train split of that shard."""

    def __init__(self, plan: StreamPlan) -> None:
        self.read = ReadImages(plan.images, plan.encoding.settings.masks, "train")

    def __call__(self, block: pa.Table) -> pa.Table:
        images = self.read(block)
        return images.append_column("window", pa.array([block["window"][0].as_py()] * images.num_rows, pa.int64()))


class Augment:
    """Ray Data operator: small random shifts, scalings and exposure changes, seeded by (seed, window, shard).

    Images are not mirrored: the heart is on the left.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch
        from torchvision.transforms import v2

        window, shard, side = (block[name][0].as_py() for name in ("window", "shard", "side"))
        augment = v2.Compose([v2.RandomAffine(2, (0.02, 0.02), (0.97, 1.03)), v2.ColorJitter(0.05, 0.05)])
        torch.manual_seed(step_seed(self.seed, window) ^ shard)
        images = (torch.from_numpy(np.frombuffer(row.as_py(), np.uint8).copy()).view(1, side, side)
                  for row in block["pixels"])
        augmented = pa.array([augment(image).numpy().tobytes() for image in images], pa.binary())
        return block.set_column(block.schema.get_field_index("pixels"), "pixels", augmented)
