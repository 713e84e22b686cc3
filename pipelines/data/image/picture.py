"""What a reader of any kind of file gives: gray pixels, or the reason why there are none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.data.settings import Data

PERCENTILES = (0.5, 99.5)  # of more than 8 bits, mapped to 0 and 255


class Refused(Exception):
    """This image cannot be used.  `reason` is one of a short list to count by; the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """One decoded file in 8 bits of gray, dark where air is."""

    image: Image.Image  # mode L; a JPEG may have been scaled down on the way
    width: int  # pixels of the original
    height: int
    mapping: str  # how its values became 8 bits: none, percentile, window (the file's own, then percentile)


def check_size(width: int, height: int, settings: Data) -> None:
    """Raise Refused for images too small to learn from or too large to decode."""
    if min(width, height) < settings.min_side:
        raise Refused("too_small", f"{width}x{height} pixels; data.min_side={settings.min_side}")
    if width * height > settings.max_pixels:
        raise Refused("too_large", f"{width}x{height} pixels; data.max_pixels={settings.max_pixels}")


def to_8bit(values: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    """Map PERCENTILES of `values` to 0 and 255.

    Args:
        values: float, any shape.
        ignored: bool, same shape: pixels that are no picture; they count for nothing and become 0.

    Returns:
        uint8 of the same shape.
    """
    low, high = np.percentile(values if ignored is None else values[~ignored], PERCENTILES)
    levels = (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)
    return levels if ignored is None else np.where(ignored, np.uint8(0), levels)
