"""Images in tables: PNG bytes as `datasets` reads them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa


def png(image: np.ndarray) -> dict:
    """An 8-bit gray image (H, W) as the struct that `datasets` decodes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": None}


def picture(image: pa.StructScalar) -> np.ndarray:
    """One image of a table, decoded: uint8 (H, W)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(image["bytes"].as_py())))


def pixels(table: pa.Table) -> np.ndarray:
    """The images of a table, decoded: uint8 (N, 1, H, W)."""
    images = [picture(row) for row in table["image"]]
    return np.stack(images)[:, None] if images else np.zeros((0, 1, 0, 0), np.uint8)
