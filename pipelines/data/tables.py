"""Parquet tables in atomic, numbered shards: `part-00012.parquet` is there and whole, or it is not there."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import Folder


def shard_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def write_shard(folder: Folder, index: int, table: pa.Table) -> None:
    """Commit one shard; writing it twice leaves one."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    folder.write(shard_name(index), buffer.getvalue())


def shard_count(rows: int, shard_rows: int) -> int:
    return -(-rows // shard_rows)


def pending_shards(folder: Folder, count: int) -> list[int]:
    """Indices of the shards of `count` that are not yet committed."""
    done = set(folder.names(".parquet"))
    return [index for index in range(count) if shard_name(index) not in done]


def read_shard(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(folder.read(name)), columns=list(columns) if columns else None)


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


def known_labels(table: pa.Table) -> list[str]:
    """The distinct labels of a table, sorted."""
    return sorted({label for labels in table["labels"].to_pylist() for label in labels})


def multi_hot(table: pa.Table, labels: Sequence[str]) -> np.ndarray:
    """The labels column as float32 (N, len(labels)); other labels than these are left out."""
    position = {label: k for k, label in enumerate(labels)}
    hot = np.zeros((table.num_rows, len(labels)), np.float32)
    for row, present in enumerate(table["labels"].to_pylist()):
        hot[row, [position[label] for label in present if label in position]] = 1
    return hot
