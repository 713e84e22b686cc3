"""Images in tables: PNG bytes as `datasets` reads them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Folder
from pipelines.tables.parquet import AHEAD, column_shards, read_ahead, read_shard


def encode_png(image: np.ndarray) -> dict:
    """An 8-bit gray image (H, W) as the struct that `datasets` decodes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": None}


def decode_image(image: pa.StructScalar) -> np.ndarray:
    """One image of a table, decoded: uint8 (H, W)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(image["bytes"].as_py())))


def decode_images(table: pa.Table) -> np.ndarray:
    """The images of a table, decoded: uint8 (N, 1, H, W)."""
    images = [decode_image(row) for row in table["image"]]
    return np.stack(images)[:, None] if images else np.zeros((0, 1, 0, 0), np.uint8)


def images_by_id(table: Folder, ids: Sequence[str]) -> np.ndarray:
    """The images with these ids, in this order, uint8 (N, 1, H, W).  Only the shards that contain them are read."""
    id_array = pa.array(ids, pa.string())
    rows = {name: np.flatnonzero(pc.is_in(shard["image_id"], id_array))
            for name, shard in column_shards(table, ["image_id"]).items()}
    found: dict[str, np.ndarray] = {}
    for shard in read_ahead(lambda name: read_shard(table, name, ["image_id", "image"]).take(rows[name]),
                            [name for name in rows if len(rows[name])], AHEAD):
        found |= dict(zip(shard["image_id"].to_pylist(), decode_images(shard), strict=True))
    return np.stack([found[image_id] for image_id in ids])
