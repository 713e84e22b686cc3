"""Parquet tables in atomic, numbered shards: `part-00012.parquet` is there and whole, or it is not there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import Folder

READERS = 4  # shards read side by side, for a file system far away


def shard_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def write_shard(folder: Folder, index: int, table: pa.Table, replace: bool = True) -> None:
    """Commit one shard; with `replace=False` only where it is not there yet."""
    write_file(folder, shard_name(index), table, replace)


def write_file(folder: Folder, name: str, table: pa.Table, replace: bool = True) -> None:
    """Commit a table as one Parquet file, which `read_shard` reads."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    folder.write(name, buffer.getvalue(), replace)


def shard_count(rows: int, shard_rows: int) -> int:
    return -(-rows // shard_rows)


def pending_shards(folder: Folder, count: int) -> list[int]:
    """Indices of the shards of `count` that are not yet committed."""
    done = set(folder.names(".parquet"))
    return [index for index in range(count) if shard_name(index) not in done]


def read_shard(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    if columns is None:
        return pq.read_table(pa.BufferReader(folder.read(name)))
    with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:  # only the bytes of these columns
        return pq.ParquetFile(file).read(list(columns))


def row_count(folder: Folder, name: str) -> int:
    """Rows of one shard, by its footer."""
    with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
        return pq.read_metadata(file).num_rows


def read_table(folder: Folder, columns: Sequence[str] | None = None, split: str | None = None) -> pa.Table:
    """All shards in order, as one table.  Only rows of `split` where it is given."""
    wanted = None if columns is None else list(dict.fromkeys([*columns, *(["split"] if split else [])]))
    tables = [read_shard(folder, name, wanted) for name in folder.names(".parquet")]
    table = pa.concat_tables(tables).combine_chunks() if tables else pa.table({})
    return table.filter(pc.field("split") == split) if split and table.num_rows else table


def png(image: np.ndarray) -> dict:
    """An 8-bit gray image (H, W) as the struct that `datasets` decodes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(table: pa.Table) -> np.ndarray:
    """The images of a table, decoded: uint8 (N, 1, H, W)."""
    from PIL import Image

    images = [np.asarray(Image.open(io.BytesIO(row["bytes"].as_py()))) for row in table["image"]]
    return np.stack(images)[:, None] if images else np.zeros((0, 1, 0, 0), np.uint8)


def tensors(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-shape tensor column as one array (N, …)."""
    return table[column].combine_chunks().to_numpy_ndarray() if table.num_rows else np.zeros((0,), np.float16)


def read_tensors(folder: Folder, names: Sequence[str], others: Sequence[str], split: str) \
        -> tuple[dict[str, np.ndarray], pa.Table]:
    """One split of a table with fixed-shape tensor columns, shards read side by side and each value copied once.

    Returns:
        The columns `names` as arrays (N, …), and the columns `others` as a table, in the order of the shards.
    """
    def read(name: str) -> tuple[list[Any], pa.Table]:
        shard = read_shard(folder, name, [*names, *others, "split"])
        rows = np.asarray(pc.equal(shard["split"], split))
        values = [tensors(shard, column) for column in names]
        return values if rows.all() else [value[rows] for value in values], shard.select(others).filter(rows)

    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(read, folder.names(".parquet")))
    arrays = {}
    for k, column in enumerate(names):
        found = [values[k] for values, _ in parts if len(values[k])]
        arrays[column] = np.concatenate(found) if found else np.zeros((0,), np.float16)
        for values, _ in parts:
            values[k] = None  # freed, so that two copies of one column are the most there is
    return arrays, pa.concat_tables([told for _, told in parts]).combine_chunks()


def known_labels(table: pa.Table) -> list[str]:
    """The distinct labels of a table, sorted."""
    return sorted(pc.unique(pc.list_flatten(table["labels"]).drop_null()).to_pylist())


def multi_hot(table: pa.Table, labels: Sequence[str]) -> np.ndarray:
    """The labels column as float32 (N, len(labels)); other labels than these are left out."""
    hot = np.zeros((table.num_rows, len(labels)), np.float32)
    column = table["labels"].combine_chunks()
    if len(column) and labels:
        index = pc.index_in(pc.list_flatten(column), pa.array(labels, pa.string()))
        known = np.asarray(index.is_valid())
        hot[np.asarray(pc.list_parent_indices(column))[known], np.asarray(index.drop_null())] = 1
    return hot
