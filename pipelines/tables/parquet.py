"""Parquet tables in atomic, numbered shards: `part-00012.parquet` exists as a whole or not at all.

Reads and writes of a file are retried while the storage fails (`cluster.faults.with_retries`).
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.faults import with_retries
from cluster.storage import Folder

READERS = 8  # shards read in parallel, for remote file systems
ROW_GROUP = 8 << 20  # bytes of tensors in a row group
AHEAD = 2  # shards of images read in advance
Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]  # (name, shape, dtype)
Item = TypeVar("Item")
Result = TypeVar("Result")


def shard_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def split_name(split: str, index: int) -> str:
    """Of the file with the rows of one split of shard `index`, in a table whose splits have files of their own."""
    return f"{split}-{index:05d}.parquet"


def files(folder: Folder, split: str | None = None) -> list[str]:
    """Names of a table's files, without those that hold only other splits."""
    names = folder.names(".parquet")
    return [name for name in names if name.startswith((f"{split}-", "part-"))] if split else names


def write_shard(folder: Folder, index: int, table: pa.Table, replace: bool = True) -> None:
    """Commit one shard; with `replace=False` only if it does not exist yet."""
    write_file(folder, shard_name(index), table, replace)


def write_file(folder: Folder, name: str, table: pa.Table, replace: bool = True) -> None:
    """Commit a table as one Parquet file, which `read_shard` reads.

    Tensors of half precision stay uncompressed and out of dictionaries: they would be 8 % smaller and take eight times
    as long to read. Their row groups are small enough for reading single rows.
    """
    buffer = io.BytesIO()
    tensor = any(isinstance(field.type, pa.FixedShapeTensorType) for field in table.schema)
    rows = max(1, ROW_GROUP * table.num_rows // max(table.nbytes, 1)) if tensor else None
    pq.write_table(table, buffer, rows, compression="none" if tensor else "zstd", use_dictionary=not tensor)
    with_retries(lambda: folder.write(name, buffer.getvalue(), replace), f"{folder.uri}/{name}")


def shard_count(rows: int, shard_rows: int) -> int:
    return -(-rows // shard_rows)


def pending_shards(folder: Folder, count: int) -> list[int]:
    """Indices below `count` of the shards that are not yet committed."""
    done = set(folder.names(".parquet"))
    return [index for index in range(count) if shard_name(index) not in done]


def read_file(folder: Folder, name: str, function: Callable[[pa.NativeFile], Result]) -> Result:
    """`function` of the opened file, repeated while the storage fails.

    Raises:
        StorageUnavailable: the file cannot be read.
    """
    def read() -> Result:
        with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
            return function(file)

    return with_retries(read, f"{folder.uri}/{name}")


def read_shard(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard; with `columns` only the bytes of these are read.

    Raises:
        StorageUnavailable: it cannot be read.
    """
    if columns is None:
        content = with_retries(lambda: folder.read(name), f"{folder.uri}/{name}")  # one request on S3
        return pq.read_table(pa.BufferReader(content))
    return read_split(folder, name, columns, None)


def row_count(folder: Folder, name: str) -> int:
    """Rows of one shard, by its footer."""
    return read_file(folder, name, pq.read_metadata).num_rows


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`function` of each item, in order; threads compute at most `ahead` results in advance."""
    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_split(folder: Folder, name: str, columns: Sequence[str], split: str | None) -> pa.Table:
    """Columns of one shard, restricted to `split` if given; of a shard without such rows only `split` is read."""
    def read(file: pa.NativeFile) -> pa.Table:
        shard = pq.ParquetFile(file, pre_buffer=True)
        if split is None:
            return shard.read(list(columns))
        chosen = pc.equal(shard.read(["split"])["split"], split)
        if not pc.any(chosen).as_py():
            return pa.schema([shard.schema_arrow.field(column) for column in columns]).empty_table()
        return shard.read(list(columns)).filter(chosen)

    return read_file(folder, name, read)


def iterate_shards(folder: Folder, columns: Sequence[str], split: str | None = None) -> Iterator[pa.Table]:
    """Columns of every shard in order, restricted to `split` if given; AHEAD + 1 shards are in memory."""
    return read_ahead(lambda name: read_split(folder, name, columns, split), files(folder, split), AHEAD)


def column_shards(folder: Folder, columns: Sequence[str], split: str | None = None) -> dict[str, pa.Table]:
    """Small columns of all shards by the shard's name, restricted to `split` if given.

    Images and tensors, whose size is unbounded over a whole table, are refused: use `iterate_shards` or
    `pipelines.tables.draw` for them.
    """
    def read(name: str) -> pa.Table:
        table = read_split(folder, name, columns, split)
        assert all(map(is_small, table.schema.types)), f"{folder.uri}: among {list(columns)} are images or tensors"
        return table

    names = files(folder, split)
    return dict(zip(names, read_ahead(read, names, READERS), strict=True))


def read_columns(folder: Folder, columns: Sequence[str], split: str | None = None) -> pa.Table:
    """`column_shards` as one table, in the order of the shards."""
    shards = list(column_shards(folder, columns, split).values())
    return pa.concat_tables(shards).combine_chunks() if shards else pa.table({column: [] for column in columns})


def is_small(kind: pa.DataType) -> bool:
    """Whether values of a type are names, numbers, hashes or lists of these, and neither images nor tensors."""
    if pa.types.is_struct(kind):
        return not any(pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type) for field in kind)
    return not isinstance(kind, pa.FixedShapeTensorType)


def tensors(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-shape tensor column as one array (N, …)."""
    return table[column].combine_chunks().to_numpy_ndarray() if table.num_rows else np.zeros((0,), np.float16)


def read_tensors(folder: Folder, names: Sequence[str], others: Sequence[str], split: str,
                 allocate: Allocate = lambda name, shape, dtype: np.empty(shape, dtype)) \
        -> tuple[dict[str, np.ndarray], pa.Table]:
    """One split of a table with fixed-shape tensor columns; shards are read in parallel and no value is held twice.

    Args:
        allocate: allocates the arrays to fill.

    Returns:
        The columns `names` as arrays (N, …), and the columns `others` as a table, in the order of the shards.
    """
    shards = files(folder, split)
    with ThreadPoolExecutor(READERS) as pool:
        metadata = list(pool.map(lambda name: read_shard(folder, name, [*others, "split"]), shards))
        chosen = [np.asarray(pc.equal(shard["split"], split)) for shard in metadata]
        starts = np.cumsum([0, *(rows.sum() for rows in chosen)])
        arrays = {name: np.zeros((0,), np.float16) for name in names}
        if shards:
            schema = read_file(folder, shards[0], pq.read_schema)
            for name in names:
                kind = schema.field(name).type
                dtype = np.dtype(kind.value_type.to_pandas_dtype())
                arrays[name] = allocate(name, (int(starts[-1]), *kind.shape), dtype)

        def fill(index: int) -> None:
            shard, rows = read_shard(folder, shards[index], names), chosen[index]
            for name in names:
                values = tensors(shard, name)
                arrays[name][starts[index] : starts[index + 1]] = values if rows.all() else values[rows]

        if names:
            list(pool.map(fill, [index for index, rows in enumerate(chosen) if rows.any()]))
    kept = [shard.select(others).filter(rows) for shard, rows in zip(metadata, chosen, strict=True)]
    return arrays, pa.concat_tables(kept).combine_chunks()
