"""One file of any supported kind to one clean 8-bit gray square; what cannot be used is refused with a reason."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipelines.settings import Data

if TYPE_CHECKING:
    from pydicom.uid import UID

Image.MAX_IMAGE_PIXELS = None  # data.max_pixels is checked before any pixel is decoded
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")  # nothing else that Pillow would read, or run a program for, by content
PERCENTILES = (0.5, 99.5)  # of more than 8 bits, mapped to 0 and 255


class Refused(Exception):
    """This image cannot be used.  `reason` is one of a short list to count by; the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    image: np.ndarray  # uint8 (size, size)
    width: int  # pixels of the original
    height: int
    sha256: str  # of the original's bytes


def decode(content: bytes, settings: Data) -> Decoded:
    """Decode, crop to the centre square, resize with antialiasing.

    Raises:
        Refused: empty_file, not_an_image, truncated, unsupported, too_small, too_large, constant.
    """
    if not content:
        raise Refused("empty_file", "the file holds no bytes")
    gray = _dicom(content, settings) if _is_dicom(content) else _picture(content, settings)
    width, height = gray.original
    side = min(gray.image.size)
    left, top = (gray.image.width - side) // 2, (gray.image.height - side) // 2
    square = gray.image.resize((settings.size, settings.size), Image.Resampling.BICUBIC,
                               box=(left, top, left + side, top + side))
    image = np.asarray(square, np.uint8)
    if image.min() == image.max():
        raise Refused("constant", f"all pixels are {image.flat[0]}")
    return Decoded(image, width, height, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class _Gray:
    image: Image.Image  # mode L
    original: tuple[int, int]  # width and height before any scaled decoding


def _check_size(width: int, height: int, settings: Data) -> None:
    if min(width, height) < settings.min_side:
        raise Refused("too_small", f"{width}x{height} pixels; data.min_side={settings.min_side}")
    if width * height > settings.max_pixels:
        raise Refused("too_large", f"{width}x{height} pixels; data.max_pixels={settings.max_pixels}")


def _picture(content: bytes, settings: Data) -> _Gray:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # Pillow's readers raise many kinds
        raise Refused("not_an_image", f"starts with {content[:8]!r}; read are DICOM, {', '.join(FORMATS)}") from error
    _check_size(*image.size, settings)
    original = image.size
    image.draft("L", (settings.size, settings.size))  # JPEG is scaled in the DCT domain
    try:
        image.load()
    except Exception as error:
        raise Refused("truncated", str(error)) from error
    if image.mode.startswith("I") or image.mode == "F":
        return _Gray(Image.fromarray(to_8bit(np.asarray(image, np.float32))), original)
    try:
        return _Gray(image.convert("L"), original)
    except ValueError as error:
        raise Refused("unsupported", str(error)) from error


def _is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM" or content[:2] in (b"\x02\x00", b"\x08\x00")  # the first group, with no head


def _dicom(content: bytes, settings: Data) -> _Gray:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
    from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    try:
        dataset = pydicom.dcmread(io.BytesIO(content), force=True)
        width, height, frames = int(dataset.Columns), int(dataset.Rows), int(dataset.get("NumberOfFrames") or 1)
        if not dataset.file_meta.get("TransferSyntaxUID"):  # written before files had a head of their own
            implicit = dataset.original_encoding[0]
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    except Exception as error:
        raise Refused("not_an_image", f"DICOM without a readable image: {error}") from error
    _check_size(width, height, settings)
    if frames != 1:
        raise Refused("unsupported", f"{frames} frames; one is read")
    if not _can_decode(syntax):
        raise Refused("unsupported", f"no decoder is installed for the transfer syntax {syntax.name}")
    try:
        pixels = dataset.pixel_array
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
        if pixels.ndim == 3:
            return _Gray(Image.fromarray(to_8bit(pixels[..., :3].astype(np.float32).mean(-1))), (width, height))
        values = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset).astype(np.float32)
    except Exception as error:  # pydicom's decoders raise many kinds
        raise Refused("truncated", f"pixel data cannot be decoded: {error}") from error
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        values = values.max() - values
    return _Gray(Image.fromarray(to_8bit(values)), (width, height))


def _can_decode(syntax: UID) -> bool:
    from pydicom.pixels import get_decoder

    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def to_8bit(values: np.ndarray) -> np.ndarray:
    """Map PERCENTILES of `values` (float, any shape) to 0 and 255; uint8 of the same shape."""
    low, high = np.percentile(values, PERCENTILES)
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)
