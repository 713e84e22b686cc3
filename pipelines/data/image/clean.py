"""From a decoded image to the training square, with a record of the crop."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.fft import dct

from pipelines.data.image.picture import GrayImage

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the original

UNIFORM = 12  # gray levels: maximal range of a border's rows and columns, without their brightest and darkest 2 %
BORDER_LIMIT = 0.4  # of a side; a larger uniform area is dark lung or a white hemithorax, and is kept
LOOKED_AT = 256  # pixels per side at which borders are detected
ASPECTS = (0.6, 1.67)  # width over height of frontal radiographs
SYMMETRY = 0.2  # minimal correlation of a frontal radiograph with its mirror image
HASHED_AT = 64  # pixels per side
COSINES = dct(np.eye(HASHED_AT, dtype=np.float32), axis=0)[:16]  # lowest frequencies of a cosine transform
TEXT_HEIGHT = (0.008, 0.08)  # of a letter, as a fraction of the image height
TEXT_LEVEL = 245  # minimal gray of letters and lead markers


def picture_box(picture: GrayImage, crop_border: bool, fit: str) -> Box:
    """The part of the original that the square shows.

    Args:
        picture: As decoded.
        crop_border: Leave out uniform borders: collimation, frames, padding.
        fit: `crop` keeps the centre square, `pad` everything (the box then extends beyond the image).
    """
    left, top, right, bottom = _content(np.asarray(picture.image)) if crop_border else (0.0, 0.0, 1.0, 1.0)
    left, right = left * picture.width, right * picture.width
    top, bottom = top * picture.height, bottom * picture.height
    sides = right - left, bottom - top
    side = min(sides) if fit == "crop" else max(sides)
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def square(image: Image.Image, original: tuple[int, int], box: Box, size: int) -> np.ndarray:
    """The box of the original as uint8 (size, size), antialiased; black outside the image.

    Args:
        image: Mode L, of any resolution, showing the whole original.
        original: Width and height that the box counts in.
        box: What to show.
        size: Pixels a side.
    """
    scale = image.width / original[0], image.height / original[1]
    left, top, right, bottom = (edge * scale[k % 2] for k, edge in enumerate(box))
    wide, tall = right - left, bottom - top
    inside = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    place = [round(edge * size) for edge in ((inside[0] - left) / wide, (inside[1] - top) / tall,
                                             (inside[2] - left) / wide, (inside[3] - top) / tall)]
    shown = max(place[2] - place[0], 1), max(place[3] - place[1], 1)
    small = image.resize(shown, Image.Resampling.BICUBIC, box=inside)
    if shown == (size, size):
        return np.asarray(small, np.uint8)
    canvas = Image.new("L", (size, size))
    canvas.paste(small, (place[0], place[1]))
    return np.asarray(canvas, np.uint8)


def _content(gray: np.ndarray) -> Box:
    """The box without uniform borders, as fractions of width and height."""
    step = max(1, max(gray.shape) // LOOKED_AT)
    seen = gray[::step, ::step]
    top, bottom = _ends(seen)
    left, right = _ends(seen[int(top * len(seen)) : max(int(bottom * len(seen)), 1)].T)
    return left, top, right, bottom


def _ends(rows: np.ndarray) -> tuple[float, float]:
    """First and last row inside the borders, as fractions; each border is as uniform as its outermost row."""
    return _border(rows), 1 - _border(rows[::-1])


def _border(rows: np.ndarray) -> float:
    """Fraction of rows at the start that form one uniform border."""
    low, high = _range(rows[:1])
    if high[0] - low[0] > UNIFORM:  # as in most pictures
        return 0.0
    low, high = _range(rows[: int(BORDER_LIMIT * len(rows)) + 2])
    uniform = np.maximum.accumulate(high) - np.minimum.accumulate(low) <= UNIFORM
    count = len(uniform) if uniform.all() else int(uniform.argmin())
    return 0.0 if count > BORDER_LIMIT * len(rows) else count / len(rows)


def _range(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Darkest and brightest level of each row, without 2 % at either end."""
    levels = np.sort(rows, axis=1).astype(np.int16)
    few = levels.shape[1] // 50
    return levels[:, few], levels[:, -1 - few]


def looks_frontal(picture: GrayImage) -> bool:
    """Whether aspect ratio and symmetry of a radiograph of unknown view are those of a frontal one."""
    if not ASPECTS[0] <= picture.width / picture.height <= ASPECTS[1]:
        return False
    small = np.asarray(picture.image.resize((32, 32), Image.Resampling.BOX), np.float32)
    mirrored = small[:, ::-1]
    return bool(small.std() > 0) and float(np.corrcoef(small.ravel(), mirrored.ravel())[0, 1]) >= SYMMETRY


def erase_text(image: Image.Image) -> tuple[Image.Image, int]:
    """Paint over bright letters and lead markers on dark background in the outer quarter.

    Returns:
        The image, and the number of marks painted over.
    """
    pixels = np.array(image)
    height, width = pixels.shape
    marks, _ = ndimage.label(pixels >= TEXT_LEVEL, structure=np.ones((3, 3)))
    erased = 0
    for rows, columns in ndimage.find_objects(marks):
        tall, wide = (rows.stop - rows.start) / height, (columns.stop - columns.start) / width
        middle = (rows.start + rows.stop) / 2 / height, (columns.start + columns.stop) / 2 / width
        if not (TEXT_HEIGHT[0] <= tall <= TEXT_HEIGHT[1] and wide <= 2 * TEXT_HEIGHT[1]) \
                or all(0.25 < m < 0.75 for m in middle):
            continue
        margin = 1 + (rows.stop - rows.start) // 4
        around = (slice(max(rows.start - margin, 0), rows.stop + margin),
                  slice(max(columns.start - margin, 0), columns.stop + margin))
        region = pixels[around]
        ground = float(np.median(region[region < TEXT_LEVEL])) if (region < TEXT_LEVEL).any() else 255.0
        if ground < 128:
            region[region > ground + 16] = ground
            erased += 1
    return Image.fromarray(pixels), erased


def perceptual_hash(image: Image.Image) -> bytes:
    """256 bits that are nearly equal for copies of an image, whatever their size, format and contrast.

    The signs of the lowest 16x16 frequencies of a cosine transform, about their median (pHash, Zauner 2010; as
    imagehash.phash does it, at a third of its time). The image is all of the picture, and its hash depends on no
    setting.
    """
    small = np.asarray(image.resize((HASHED_AT, HASHED_AT), Image.Resampling.HAMMING), np.float32)
    low = COSINES @ small @ COSINES.T
    return np.packbits(low > np.partition(low, low.size // 2 - 1, axis=None)[low.size // 2 - 1]).tobytes()
