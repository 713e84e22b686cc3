"""Ray Data streams images into training: read, augmented, encoded by a pool of actors, in the order of the windows.

One actor, the feed, runs the pipeline and holds references to the encoded shards of two windows at most; what lies
behind them stays in the object stores of the nodes that encoded it. How far the pipeline runs ahead is thereby bounded,
whatever the size of the set.
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
from pipelines.generator.latents.encode import Encode, Encoding, ReadImages
from pipelines.learning.order import WindowedOrder, step_seed

WINDOWS = 2  # held at a time
SHARDS = 4_096  # that one pipeline goes through before the next begins


@dataclass(frozen=True)
class StreamPlan:
    """What the feed streams.

    Args:
        images: the table of clean images.
        encode: networks, and what is kept of an image.
        rows: images of the train split in each shard.
        seed: of the order, and of the augmentation.
        window: shards that are shuffled together.
        augment: whether to shift, scale and expose each image a little differently in every epoch.
        actors: that encode, and Ray's arguments for each.
        reserved: CPUs and GPUs that the trainers hold.
    """

    images: Folder
    encode: Encode
    rows: tuple[int, ...]
    seed: int
    window: int
    augment: bool
    actors: int
    needs: dict[str, Any]
    reserved: dict[str, float]

    def order(self) -> WindowedOrder:
        return WindowedOrder(self.rows, self.seed, self.window)


class Feed:
    """A Ray actor that hands encoded shards to the trainers; all methods but `__init__` are asynchronous."""

    def __init__(self, plan: StreamPlan, cursor: int, total: int, world: int) -> None:
        self.plan, self.cursor, self.total, self.world = plan, cursor, total, world
        self._blocks: dict[int, dict[int, Any]] = {}  # by the window's start: the reference to each shard
        self._at: dict[int, int] = {}  # by rank: the window it was last given a shard of
        self._error: BaseException | None = None
        self._changed: asyncio.Condition | None = None

    async def start(self) -> None:
        """Begin to stream; answers at once."""
        self._changed = asyncio.Condition()
        threading.Thread(target=self._run, args=(asyncio.get_running_loop(),), daemon=True).start()

    async def shard(self, rank: int, window: int, shard: int) -> list[Any]:
        """A reference to an encoded shard of the window that starts at cursor `window`, in a list, where Ray leaves it.

        Windows that all ranks have left are let go.
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
        """Windows of which there are shards now."""
        return len(self._blocks)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            for window, shard, block in encoded_shards(self.plan, self.cursor, self.total):
                asyncio.run_coroutine_threadsafe(self._put(window, shard, block), loop).result()
        except BaseException as error:
            asyncio.run_coroutine_threadsafe(self._fail(error), loop).result()

    async def _put(self, window: int, shard: int, block: Any) -> None:
        """Keep a block; waits while WINDOWS other windows are held."""
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
    """Start of its window, number and reference of each encoded shard, in the order of the windows from `cursor` on."""
    order, ahead = plan.order(), np.zeros((0, 2), np.int64)
    while cursor < total or len(ahead):
        while cursor < total and len(ahead) < SHARDS:
            window = order.window_at(cursor)
            ahead = np.concatenate([ahead, np.stack([np.full(len(window.shards), window.start), window.shards], 1)])
            cursor = window.stop
        for (start, shard), block in zip(ahead.tolist(), _encoded(plan, ahead), strict=True):
            yield start, shard, block
        ahead = ahead[:0]


def _encoded(plan: StreamPlan, places: np.ndarray) -> Iterator[Any]:
    """References to the encoded shards at `places` (N, 2), window and shard, in their order."""
    import ray.data
    from ray.data import ActorPoolStrategy, ExecutionResources

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a shard stays one block
    context.execution_options.preserve_order = True
    context.execution_options.exclude_resources = ExecutionResources(**plan.reserved)
    data = ray.data.from_arrow([pa.table({"window": [window], "shard": [shard]}) for window, shard in places.tolist()])
    operators: list[tuple[Any, dict[str, Any]]] = [(_Read(plan), {"num_cpus": 0.25})]
    if plan.augment:
        operators.append((Augment(plan.seed), {"num_cpus": 0.25}))
    operators.append((Encoding, {"compute": ActorPoolStrategy(size=plan.actors), **plan.needs}))
    for operator, arguments in operators:
        data = data.map_batches(operator, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **arguments)
    for bundle in data.iter_internal_ref_bundles():
        yield from bundle.block_refs


class _Read:
    """Ray Data operator: a place of the stream to the decoded images of the train split of its shard."""

    def __init__(self, plan: StreamPlan) -> None:
        self.read = ReadImages(plan.images, plan.encode.settings.masks, "train")

    def __call__(self, block: pa.Table) -> pa.Table:
        images = self.read(block)
        return images.append_column("window", pa.array([block["window"][0].as_py()] * images.num_rows, pa.int64()))


class Augment:
    """Ray Data operator: small shifts, scalings and changes of exposure, a function of seed, window and shard.

    Images are not mirrored: the heart is on the left.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch
        from torchvision.transforms import v2

        window, shard, side = (block[name][0].as_py() for name in ("window", "shard", "side"))
        change = v2.Compose([v2.RandomAffine(2, (0.02, 0.02), (0.97, 1.03)), v2.ColorJitter(0.05, 0.05)])
        torch.manual_seed(step_seed(self.seed, window) ^ shard)
        images = (torch.from_numpy(np.frombuffer(row.as_py(), np.uint8).copy()).view(1, side, side)
                  for row in block["pixels"])
        changed = pa.array([change(image).numpy().tobytes() for image in images], pa.binary())
        return block.set_column(block.schema.get_field_index("pixels"), "pixels", changed)
