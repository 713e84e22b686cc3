"""Decodes one file of any supported format to a clean 8-bit gray square, or rejects it with a reason."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from pipelines.data.image import clean
from pipelines.data.image.dicom import is_dicom, read_dicom
from pipelines.data.image.picture import GrayImage, Refused, check_size, refusing, to_8bit
from pipelines.data.settings import DataSettings

Image.MAX_IMAGE_PIXELS = None  # data.max_pixels is checked before any pixel is decoded
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")  # no other format, for some of which Pillow runs external programs

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # last bytes of a complete file


@dataclass(frozen=True)
class Decoded:
    """A clean image and its provenance."""

    image: np.ndarray  # uint8 (size, size)
    width: int  # pixels of the original
    height: int
    sha256: str  # of the original's bytes
    box: tuple[int, int, int, int]  # crop box (left, top, right, bottom) in pixels of the original
    phash: bytes  # 256 bits, nearly equal for copies of an image
    mapping: str = "none"  # mapping to 8 bits, as in `GrayImage`; ends in ", inverted" if inverted
    erased: int = 0  # number of text marks painted over
    mask: np.ndarray | None = None  # uint8 (size, size): 0, or the number of a structure
    structures: tuple[str, ...] = ()  # annotated in the mask, even if they cover no pixel


def decode(content: bytes, settings: DataSettings, *, view: str | None = None, inverted: bool = False,
           read: Callable[[bytes, DataSettings], GrayImage] | None = None) -> Decoded:
    """Decode, clean and resize with antialiasing.

    Args:
        content: bytes of the file.
        settings: how to clean it.
        view: as named by its source; if None, `data.frontal` is decided from the pixels.
        inverted: invert the gray values, if only the source's tables say that air is bright.
        read: reader of a format specific to the source.

    Raises:
        Refused: with one of the reasons of `picture.DEFECTS` and `picture.NOT_WANTED`.
    """
    if not content:
        raise Refused("empty_file", "the file holds no bytes")
    picture = _upright((read or read_picture)(content, settings), inverted)
    phash = clean.perceptual_hash(picture.image)
    box = clean.picture_box(picture, settings.crop_border, settings.fit)
    shown = (box[2] - box[0]) * picture.image.width / picture.width
    if shown < settings.size and picture.image.width < picture.width:  # DCT scaling left too few pixels in the box
        picture = _upright(read_picture(content, settings, scaled=False), inverted)
    if settings.frontal and view is None and not clean.looks_frontal(picture):
        raise Refused("not_frontal", "the view is unknown, and aspect ratio or symmetry is not that of a frontal one")
    gray, erased = clean.erase_text(picture.image) if settings.erase_text else (picture.image, 0)
    image = clean.square(gray, (picture.width, picture.height), box, settings.size)
    if image.min() == image.max():
        raise Refused("constant", f"all pixels are {image.flat[0]}")
    left, top, right, bottom = (round(edge) for edge in box)
    return Decoded(image, picture.width, picture.height, hashlib.sha256(content).hexdigest(),
                   (left, top, right, bottom), phash, picture.mapping, erased)


def _upright(picture: GrayImage, inverted: bool) -> GrayImage:
    """The image with dark air."""
    if not inverted:
        return picture
    return replace(picture, image=ImageOps.invert(picture.image), mapping=f"{picture.mapping}, inverted")


def read_picture(content: bytes, settings: DataSettings, scaled: bool = True) -> GrayImage:
    """A DICOM, JPEG, PNG, TIFF or BMP file as gray.

    Args:
        content: bytes of the file.
        settings: limits, and the target size.
        scaled: let JPEG scale in the DCT domain, to no less than the target size.
    """
    if is_dicom(content):
        return read_dicom(content, settings)
    with refusing("not_an_image", f"it is neither DICOM nor {', '.join(FORMATS)}"):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    check_size(width, height, settings)
    if scaled:
        image.draft("L", (settings.size, settings.size))
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        cut = "truncated" in str(error).lower() or ENDS.get(image.format or "", b"") not in content[-1024:]
        if cut:
            raise Refused("truncated", "the file ends inside its pixel data") from error
        raise Refused("decoder_error", f"pixel data of {image.format} cannot be decoded ({type(error).__name__})") \
            from error
    if image.mode.startswith("I") or image.mode == "F":
        return GrayImage(Image.fromarray(to_8bit(np.asarray(image, np.float32))), width, height, "percentile")
    try:
        return GrayImage(image.convert("L"), width, height, "none")
    except ValueError as error:
        raise Refused("unsupported", f"the colours of mode {image.mode} have no gray") from error
