"""Runs an operator over shards until all are committed, tolerating failures of storage, nodes and workers.

A shard that meets a storage fault is retried on another node, a bounded number of times. A shard that crashes its
worker is repeated row by row, each row in a process of its own, so that only the row that crashes is lost.
"""

from __future__ import annotations

import functools
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from cluster.errors import UserError
from cluster.faults import StorageUnavailable
from pipelines.monitor.progress import Bar, say
from pipelines.tables.streaming import results

AT_ONCE = 8  # rows of a shard in parallel, most of them waiting for the storage
CRASHES = 3  # of a worker by a shard, and then by a single row
FAULTS = 3  # of the storage that a shard may meet before the run stops
FAULTS_OF_A_NODE = 2  # in a row, after which a node is excluded
Row = dict[str, Any]


class ShardOperator(ABC):
    """Ray Data operator that commits one shard and can be repeated; it returns its failures instead of raising them."""

    def __call__(self, block: pa.Table) -> pa.Table:
        import ray

        rows = bad = 0
        outcome, detail = "done", ""
        try:
            rows, bad = self.run(block)
        except UserError as error:
            outcome, detail = "mistake", str(error)
        except OSError as error:
            outcome, detail = "fault", str(error)
        except MemoryError:  # treated as a crash: the shard is isolated
            raise
        except Exception:
            outcome, detail = "error", traceback.format_exc()
        node = ray.get_runtime_context().get_node_id()
        return pa.table({"shard": block["shard"][:1], "rows": [rows], "bad": [bad], "outcome": [outcome],
                         "detail": [detail], "node": [node]})

    @abstractmethod
    def run(self, block: pa.Table) -> tuple[int, int]:
        """Commit the shard `block["shard"][0]`.

        Returns:
            How many rows it has, and how many of them are bad.

        Raises:
            OSError: the storage failed; another node may do it.
        """

    def isolate(self, block: pa.Table, placement: dict[str, Any]) -> tuple[int, int]:
        """Commit a shard that kills its worker; on the nodes that `placement`, arguments of `ray.remote`, allows."""
        raise RuntimeError(f"{type(self).__name__} of shard {block['shard'][0]} killed its worker {CRASHES} times")


class RowOperator(ShardOperator):
    """An operator whose rows are independent of each other."""

    @abstractmethod
    def rows(self, shard: int) -> list[Row]:
        """The input rows of a shard."""

    @abstractmethod
    def one(self, row: Row) -> Row:
        """The output row of an input row."""

    @abstractmethod
    def killed(self, row: Row) -> Row:
        """The output row of an input row that crashes its process."""

    @abstractmethod
    def commit(self, shard: int, rows: list[Row]) -> tuple[int, int]:
        """Write the shard.  Returns what `run` does."""

    def run(self, block: pa.Table) -> tuple[int, int]:
        shard = block["shard"][0].as_py()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return self.commit(shard, list(pool.map(self.one, self.rows(shard))))

    def isolate(self, block: pa.Table, placement: dict[str, Any]) -> tuple[int, int]:
        import ray

        shard = block["shard"][0].as_py()
        task = functools.partial(ray.remote(max_retries=0, **placement)(_one).remote, ray.put(self))
        rows = self.rows(shard)
        first = [task(row) for row in rows]
        return self.commit(shard, [self._survived(task, row, ref) for row, ref in zip(rows, first, strict=True)])

    def _survived(self, task: Callable[[Row], Any], row: Row, ref: Any) -> Row:
        import ray
        from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

        for left in reversed(range(CRASHES)):
            try:
                return ray.get(ref)
            except RayTaskError as error:
                if not isinstance(error.cause, MemoryError):
                    raise error.cause from error
            except RayError as error:  # a lost node is not the row's fault
                if not left and not isinstance(error, WorkerCrashedError | OutOfMemoryError):
                    raise
            if left:
                ref = task(row)
        return self.killed(row)


def run_shards(operator: ShardOperator, blocks: Sequence[pa.Table], shown: Bar,
               seen: Callable[[int, int], None] = lambda rows, bad: None) -> float | None:
    """Run the operator on every block, each of which names its shard in the first row of the column `shard`.

    Args:
        operator: the work.
        blocks: one per shard.
        shown: progress bar, advanced by the rows of each committed shard.
        seen: called with the rows of each committed shard and how many of them are bad; may stop the run by raising.

    Returns:
        Rows per second, or None if there was nothing to do.

    Raises:
        StorageUnavailable: no node reaches the storage, or one shard failed on every attempt.
        UserError: raised by the operator in a worker.
    """
    if not blocks:
        return None
    left = {block["shard"][0].as_py(): block for block in blocks}
    faults: Counter[int] = Counter()
    avoided: set[str] = set()
    start, before = time.perf_counter(), shown.n
    while left:
        met, ended = _pass(operator, left, avoided, shown, seen)
        for shard in [shard for shard in left if ended and shard not in met]:
            try:
                rows, bad = operator.isolate(left[shard], _placement(avoided))
            except OSError as error:
                met[shard] = str(error)
                continue
            del left[shard]
            shown.add(rows)
            seen(rows, bad)
        for shard, detail in met.items():
            faults[shard] += 1
            if faults[shard] >= FAULTS:
                raise StorageUnavailable(detail)
    return round((shown.n - before) / (time.perf_counter() - start), 2)


def _pass(operator: ShardOperator, left: dict[int, pa.Table], avoided: set[str], shown: Bar,
          seen: Callable[[int, int], None]) -> tuple[dict[int, str], bool]:
    """One pass over the remaining shards, on the nodes that are not excluded.

    Returns:
        The storage fault of each shard that met one, and whether the pass completed; if it did, the other remaining
        shards crashed their workers.
    """
    arguments = {"max_retries": CRASHES - 1, **_placement(avoided)}
    met: dict[int, str] = {}
    of_node: Counter[str] = Counter()  # faults since it last committed a shard
    for row in results(list(left.values()), [(operator, arguments)], tolerant=True):
        detail, node = row["detail"], row["node"]
        if row["outcome"] == "done":
            of_node[node] = 0
            del left[row["shard"]]
            shown.add(row["rows"])
            seen(row["rows"], row["bad"])
        elif row["outcome"] == "mistake":
            raise UserError(detail)
        elif row["outcome"] == "error":
            raise RuntimeError(detail)
        else:
            met[row["shard"]] = detail
            of_node[node] += 1
            if of_node[node] >= FAULTS_OF_A_NODE:
                _avoid(node, avoided, detail)
                return met, False
    for node in [node for node, count in of_node.items() if count]:
        if _nodes() - avoided - {node}:
            _avoid(node, avoided, met[next(iter(met))])
    return met, True


def _placement(avoided: set[str]) -> dict[str, Any]:
    """Arguments of `ray.remote` that keep tasks off some nodes."""
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"}} if avoided else {}


def _avoid(node: str, avoided: set[str], detail: str) -> None:
    avoided.add(node)
    if not _nodes() - avoided:
        raise StorageUnavailable(detail)
    say(f"node {node[:8]} is excluded: {detail}")


def _nodes() -> set[str]:
    """Nodes that run tasks."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}


def _one(operator: RowOperator, row: Row) -> Row:
    return operator.one(row)
