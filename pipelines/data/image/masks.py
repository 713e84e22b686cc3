"""Masks of a source (files or run lengths) as one label map: 0, or the numbers of `STRUCTURES`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.image.clean import square
from pipelines.data.image.decode import Decoded
from pipelines.data.image.picture import Refused, refusing
from pipelines.data.structures import STRUCTURES

FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "BMP")
ASPECT_TOLERANCE = 0.02  # of a mask's aspect ratio against its image's; its resolution may differ
BRIGHT = 127  # threshold for masks stored as JPEG, which have all gray values


def label_map(masks: Sequence[dict[str, Any]], decoded: Decoded, read: Callable[[str], bytes]) -> np.ndarray:
    """The masks of one image, cut and resized as the image was.

    Args:
        masks: structs of the manifest (name, and path or rle); where two overlap, the later one wins.
        decoded: the image.
        read: from a mask's path to the bytes of its file; raises Refused if there is none.

    Returns:
        uint8 of the image's shape.

    Raises:
        Refused: bad_mask.
    """
    labels = np.zeros_like(decoded.image)
    original = decoded.width, decoded.height
    for mask in masks:
        content = b"" if mask["path"] is None else _read(mask, read)
        with refusing("bad_mask", f"the mask of {mask['name']} cannot be read"):
            where = _runs(mask["rle"], *original) if mask["rle"] is not None else _bright(content)
        if abs(where.width * original[1] / (where.height * original[0]) - 1) > ASPECT_TOLERANCE:
            raise Refused("bad_mask", f"the mask of {mask['name']} has {where.width}x{where.height} pixels, the image "
                          f"{original[0]}x{original[1]}: another shape")
        labels[square(where, original, decoded.box, len(labels)) > BRIGHT] = STRUCTURES[mask["name"]]
    return labels


def _read(mask: dict[str, Any], read: Callable[[str], bytes]) -> bytes:
    try:
        return read(mask["path"])
    except Refused as refused:
        raise Refused("bad_mask", f"the mask of {mask['name']}: {refused}") from refused


def _bright(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    gray = np.asarray(image.convert("L"))
    most = int(gray.max())
    level = most / 2 if most <= BRIGHT and image.format != "JPEG" else BRIGHT  # values 0 and 1 are common, too
    return Image.fromarray((gray > level) * np.uint8(255))


def _runs(text: str, width: int, height: int) -> Image.Image:
    """SIIM-ACR's run lengths: pairs of gap and length, column-major, each gap from the end of the last run."""
    numbers = np.array(text.split(), np.int64).reshape(-1, 2)
    stops = numbers.sum(1).cumsum()
    if len(stops) and (numbers.min() < 0 or stops[-1] > width * height):
        raise ValueError(f"runs up to {stops[-1]} of {width * height} pixels")
    changes = np.zeros(width * height + 1, np.int8)
    np.add.at(changes, stops - numbers[:, 1], 1)
    np.add.at(changes, stops, -1)
    inside = changes[:-1].cumsum(dtype=np.int32) > 0
    return Image.fromarray((inside.reshape(width, height).T * np.uint8(255)).copy())
