"""Ray Data over numbered shards: one block per shard, a chain of operators, one committed file per shard."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipelines.monitor.progress import Bar


def shard_numbers(indices: Sequence[int]) -> list[pa.Table]:
    """Blocks of one row each for `stream`: workers read the shards themselves, so that blocks hold no data."""
    return [pa.table({"shard": pa.array([index], pa.int32())}) for index in indices]


def stream(blocks: Sequence[pa.Table], operators: Sequence[tuple[Any, dict[str, Any]]], shown: Bar) -> float | None:
    """Send each block through the operators, the last of which returns a table with the column `rows`.

    Args:
        blocks: One table per shard.
        operators: Callables of one Arrow table, each with its own arguments for `Dataset.map_batches` (resources, or an
            actor pool in `compute`).
        shown: progress bar, advanced by the rows of each finished block.

    Returns:
        Rows per second, or None if there was nothing to do.
    """
    if not blocks:
        return None
    start, before = time.perf_counter(), shown.n
    for row in results(blocks, operators):
        shown.add(row["rows"])
    return round((shown.n - before) / (time.perf_counter() - start), 2)


def results(blocks: Sequence[pa.Table], operators: Sequence[tuple[Any, dict[str, Any]]],
            tolerant: bool = False) -> Iterator[dict[str, Any]]:
    """The rows that the last operator returns for each block, in order of completion.

    Args:
        blocks: One table per shard.
        operators: As for `stream`.
        tolerant: continue when a worker crashes more often than allowed; its block then has no rows.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # Ray's plans and notices go to its log file, not to the user
            handler.setLevel(logging.CRITICAL if tolerant else logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a shard stays one block
    context.max_errored_blocks = -1 if tolerant else 0
    data = ray.data.from_arrow(list(blocks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # there is no other way yet to limit retries
        for operator, arguments in operators:
            data = data.map_batches(operator, batch_size=None, batch_format="pyarrow", zero_copy_batch=True,
                                    **arguments)
    yield from data.iter_rows()
