"""One file of any supported kind to one clean 8-bit gray square; what cannot be used is refused with a reason."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from pipelines.data.image import clean
from pipelines.data.image.dicom import is_dicom, read_dicom
from pipelines.data.image.picture import Picture, Refused, check_size, refusing, to_8bit
from pipelines.data.settings import Data

Image.MAX_IMAGE_PIXELS = None  # data.max_pixels is checked before any pixel is decoded
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")  # nothing else that Pillow would read, or run a program for, by content

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what a whole file ends with


@dataclass(frozen=True)
class Decoded:
    """A clean image, and what was done to make it."""

    image: np.ndarray  # uint8 (size, size)
    width: int  # pixels of the original
    height: int
    sha256: str  # of the original's bytes
    box: tuple[int, int, int, int]  # left, top, right, bottom of what it shows, in pixels of the original
    phash: bytes  # 256 bits, nearly the same for copies of one picture
    mapping: str = "none"  # how the values became 8 bits, as `Picture` has it; ends in ", inverted" if turned round
    erased: int = 0  # marks and letters replaced by their ground
    mask: np.ndarray | None = None  # uint8 (size, size): 0, or the number of a structure
    structures: tuple[str, ...] = ()  # that the mask outlines, also where they take up no pixel


def decode(content: bytes, settings: Data, *, view: str | None = None, inverted: bool = False,
           read: Callable[[bytes, Data], Picture] | None = None) -> Decoded:
    """Decode, clean and resize with antialiasing.

    Args:
        content: The file.
        settings: What to make of it.
        view: As its source names it; where it is None, `data.frontal` goes by the picture.
        inverted: Turn the grays round, where only the source's tables tell that air is bright.
        read: A reader of the source's own format.

    Raises:
        Refused: with one of the reasons of `picture.BAD` and `picture.NOT_WANTED`.
    """
    if not content:
        raise Refused("empty_file", "the file holds no bytes")
    picture = _upright((read or read_picture)(content, settings), inverted)
    phash = clean.perceptual_hash(picture.image)
    box = clean.picture_box(picture, settings.crop_border, settings.fit)
    shown = (box[2] - box[0]) * picture.image.width / picture.width
    if shown < settings.size and picture.image.width < picture.width:  # scaled down too far for what is left of it
        picture = _upright(read_picture(content, settings, scaled=False), inverted)
    if settings.frontal and view is None and not clean.looks_frontal(picture):
        raise Refused("not_frontal", "no view is told, and it is not as wide and as symmetric as frontal views are")
    gray, erased = clean.erase_text(picture.image) if settings.erase_text else (picture.image, 0)
    image = clean.square(gray, (picture.width, picture.height), box, settings.size)
    if image.min() == image.max():
        raise Refused("constant", f"all pixels are {image.flat[0]}")
    left, top, right, bottom = (round(edge) for edge in box)
    return Decoded(image, picture.width, picture.height, hashlib.sha256(content).hexdigest(),
                   (left, top, right, bottom), phash, picture.mapping, erased)


def _upright(picture: Picture, inverted: bool) -> Picture:
    """The picture with air dark."""
    if not inverted:
        return picture
    return replace(picture, image=ImageOps.invert(picture.image), mapping=f"{picture.mapping}, inverted")


def read_picture(content: bytes, settings: Data, scaled: bool = True) -> Picture:
    """A DICOM, JPEG, PNG, TIFF or BMP file as gray.

    Args:
        content: The file.
        settings: Limits, and the size that is enough.
        scaled: Let a JPEG be scaled in the DCT domain on the way, to no less than the size.
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
        return Picture(Image.fromarray(to_8bit(np.asarray(image, np.float32))), width, height, "percentile")
    try:
        return Picture(image.convert("L"), width, height, "none")
    except ValueError as error:
        raise Refused("unsupported", f"the colours of mode {image.mode} have no gray") from error
