"""The result of reading an image file: 8-bit gray pixels, or the reason for rejecting it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.data.settings import DataSettings

PERCENTILES = (0.5, 99.5)  # of more than 8 bits, mapped to 0 and 255
DEFECTS = {
    "empty_file": "the file holds no bytes",
    "unreadable": "a file named in the user's own table does not exist",
    "not_an_image": "neither DICOM, JPEG, PNG, TIFF nor BMP, or a header that describes no image",
    "truncated": "the file ends inside its pixel data",
    "bad_header": "a value of the header that the pixels cannot be read without is missing or invalid",
    "bad_lut": "a look-up table that the gray values cannot be read without is invalid",
    "no_decoder": "no installed decoder reads the compression",
    "decoder_error": "a decoder failed on pixel data of full length",
    "unsupported": "several frames, or a colour space that has no gray",
    "too_small": "a side is below data.min_side",
    "too_large": "more pixels than data.max_pixels",
    "constant": "all pixels are equal",
    "bad_mask": "a mask cannot be read, or is not of the image's size",
    "killed_its_worker": "decoding it crashes the process or exhausts its memory",
    "decoder_failed": "unexpected error in a decoder; please report it",
}
NOT_WANTED = {
    "duplicate": "an equal or nearly equal image is kept",
    "not_frontal": "not a frontal view, and data.frontal=true",
    "not_an_image_object": "a DICOM report, presentation state, plan, segmentation or document",
    "not_a_radiograph": "of another modality: CT, MR, angiography, mammography, visible light, …",
    "not_for_presentation": "raw detector data: FOR PROCESSING",
    "not_a_chest": "of another part of the body, and data.chest_only=true",
}


class Refused(Exception):
    """This image cannot be used, or is out of scope.

    Args:
        reason: a key of DEFECTS or NOT_WANTED.
        detail: the finding; contains no path and no text of the file or its header.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in DEFECTS or reason in NOT_WANTED, reason
        super().__init__(detail)
        self.reason = reason


@contextmanager
def refusing(reason: str, detail: str) -> Iterator[None]:
    """Raise Refused for any error of the block, with its type in the detail: decoders and parsers raise many kinds.

    A MemoryError passes: it says nothing against the file.
    """
    try:
        yield
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise Refused(reason, f"{detail} ({type(error).__name__})") from error


@dataclass(frozen=True)
class GrayImage:
    """One decoded file in 8 bits of gray, dark where air is."""

    image: Image.Image  # mode L; a JPEG may have been scaled down on the way
    width: int  # pixels of the original
    height: int
    mapping: str  # how its values became 8 bits: none; percentile; window (the file's own, then percentile);
    #               percentile (window invalid), percentile (window saturates): its own window could not be used


def check_size(width: int, height: int, settings: DataSettings) -> None:
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
