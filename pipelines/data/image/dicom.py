"""DICOM pixels: every transfer syntax in use for radiographs, look-up tables, windows, padding and inverted grays.

What leaves ingest of a DICOM file is its pixels, why it was refused, and, through `sources.dicom`, PatientID and
StudyInstanceUID as salted hashes and ViewPosition. No detail of a refusal quotes the header's text.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.data.image import dicom_filter
from pipelines.data.image.picture import GrayImage, Refused, check_size, refusing, to_8bit
from pipelines.data.settings import DataSettings

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

NEEDED = (*dicom_filter.TAGS, "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored",
          "PixelRepresentation", "PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit",
          "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PixelData")
MAX_CLIPPED = 0.5  # of the picture: a window that leaves fewer than half of the pixels their gray hides anatomy, while
#                    one that clips the air around the patient, a third of a film, is as its reader set it
CLIPPING_SIDE = 512  # pixels a side at which clipping is counted


def is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM" or content[:2] in (b"\x02\x00", b"\x08\x00")  # the first group, with no head


def read_header(stream: Any, **options: Any) -> Dataset:
    """`pydicom.dcmread` of a file with or without a head; values against DICOM's rules are common, and not reported."""
    from pydicom import config, dcmread

    config.settings.reading_validation_mode = config.IGNORE
    return dcmread(stream, force=True, **options)


def read_dicom(content: bytes, settings: DataSettings) -> GrayImage:
    """One frame as gray.

    Raises:
        Refused: not_an_image, bad_header, bad_lut, truncated, no_decoder, decoder_error, unsupported, too_*, and those
            of `dicom_filter.refuse_unwanted`.
    """
    dataset = _header(content)
    dicom_filter.refuse_unwanted(dataset, settings)
    width, height = _checked_size(dataset, settings)
    stored = _stored(dataset)
    if stored.ndim == 3:
        gray, mapping = to_8bit(stored[..., :3].astype(np.float32).mean(-1)), "percentile"
    else:
        gray, mapping = _gray(stored, dataset)
    return GrayImage(Image.fromarray(gray), width, height, mapping)


def _header(content: bytes) -> Dataset:
    """The whole file, or all that comes before its pixels where it ends inside them."""
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with refusing("not_an_image", "the DICOM header cannot be read"):
        dataset = read_header(io.BytesIO(content))
        if "Rows" not in dataset:  # pydicom gives nothing of a file that ends inside compressed pixels
            dataset = read_header(io.BytesIO(content), stop_before_pixels=True)
        dataset.file_meta.get("MediaStorageSOPClassUID")
        if not dataset.file_meta.get("TransferSyntaxUID"):  # written before files had a head of their own
            implicit = dataset.original_encoding[0]
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    for name in NEEDED:  # pydicom parses each value at its first use
        with refusing("bad_header", f"{name} cannot be read"):
            dataset.get(name)
    return dataset


def _checked_size(dataset: Dataset, settings: DataSettings) -> tuple[int, int]:
    """Width and height in pixels, of a header from which the pixels can be read."""
    from pydicom.uid import UID

    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise Refused("not_an_image", "a DICOM header without Rows and Columns")
    numbers: dict[str, int] = {}
    defaults: dict[str, Any] = {"Rows": None, "Columns": None, "NumberOfFrames": 1, "SamplesPerPixel": 1,
                                "BitsAllocated": None, "BitsStored": None, "PixelRepresentation": 0}
    for name, default in defaults.items():
        try:
            value = dataset.get(name)
            numbers[name] = int(default if value in (None, "") else value)
        except (TypeError, ValueError) as error:
            raise Refused("bad_header", f"{name} is missing or is no number") from error
    width, height = numbers["Columns"], numbers["Rows"]
    check_size(width, height, settings)
    if numbers["NumberOfFrames"] != 1:
        raise Refused("unsupported", f"{numbers['NumberOfFrames']} frames; one is read")
    bits, allocated = numbers["BitsStored"], numbers["BitsAllocated"]
    if not 1 <= bits <= allocated or allocated not in (1, 8, 16, 32):
        raise Refused("bad_header", f"BitsStored {bits} of BitsAllocated {allocated}")
    if numbers["SamplesPerPixel"] not in (1, 3):
        raise Refused("bad_header", f"SamplesPerPixel is {numbers['SamplesPerPixel']}")
    if not dataset.get("PhotometricInterpretation"):
        raise Refused("bad_header", "PhotometricInterpretation is missing")
    if not _can_decode(syntax := UID(str(dataset.file_meta.TransferSyntaxUID))):
        raise Refused("no_decoder", "no decoder is installed for the transfer syntax "
                      + (syntax.name if syntax.name != syntax else "that it names, which is no standard one"))
    return width, height


def _can_decode(syntax: UID) -> bool:
    from pydicom.pixels import get_decoder

    from pipelines.data.image import jpeg_extended  # noqa: F401  importing it registers its decoder

    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _stored(dataset: Dataset) -> np.ndarray:
    """Stored values (H, W), or (H, W, 3) of colours."""
    from pydicom.pixels import apply_color_lut

    for name, default in (("SamplesPerPixel", 1), ("PixelRepresentation", 0)):
        if dataset.get(name) in (None, ""):
            setattr(dataset, name, default)
    try:
        stored = dataset.pixel_array
    except MemoryError:
        raise
    except Exception as error:  # pydicom's decoders raise many kinds
        if _is_cut(dataset):
            raise Refused("truncated", "the file ends inside its pixel data") from error
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise Refused("decoder_error", f"pixel data of {syntax} cannot be decoded ({type(error).__name__})") from error
    if dataset.PhotometricInterpretation != "PALETTE COLOR":
        return stored
    with refusing("bad_lut", "the palette cannot be applied"):
        return apply_color_lut(stored, dataset)


def _is_cut(dataset: Dataset) -> bool:
    """Whether pixel data is missing at the end: of JPEG's kinds, the marker that ends each."""
    from pydicom.pixels.utils import get_expected_length
    from pydicom.uid import RLELossless

    data = dataset.get("PixelData") or b""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not data or not syntax.is_compressed:
        return len(data) < get_expected_length(dataset)
    return syntax != RLELossless and not data.rstrip(b"\0").endswith(b"\xff\xd9")


def _gray(stored: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, str]:
    """Stored values (H, W) to uint8, and how they were mapped.

    The file's own look-up table or window comes first, the first where it has several; where there is none, or it is
    invalid or clips more than MAX_CLIPPED of the picture, percentiles of the values take its place.
    """
    from pydicom.pixels import apply_modality_lut

    padding = _padding(stored, dataset)
    reason = "bad_lut" if "ModalityLUTSequence" in dataset else "bad_header"
    with refusing(reason, "the modality's look-up table or rescaling cannot be applied"):
        values = np.asarray(apply_modality_lut(stored, dataset), np.float32)
    if not np.isfinite(values).all():
        raise Refused("bad_header", "RescaleSlope or RescaleIntercept is no finite number")
    shown, mapping = _windowed(values, dataset, padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = shown.max() - shown
    return to_8bit(shown, padding), mapping


def _windowed(values: np.ndarray, dataset: Dataset, padding: np.ndarray | None) -> tuple[np.ndarray, str]:
    """Values as their file asks them to be shown, where it does and they can be told apart then."""
    from pydicom.pixels import apply_voi_lut

    tables = dataset.get("VOILUTSequence")
    table = bool(tables) and "LUTDescriptor" in tables[0] and bool(tables[0].get("LUTData"))
    if not table and not _valid_window(dataset):
        asked = tables or any(dataset.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth"))
        return values, "percentile (window invalid)" if asked else "percentile"
    try:
        shown = np.asarray(apply_voi_lut(values.astype(np.int32) if table else values, dataset, index=0), np.float32)
    except MemoryError:
        raise
    except Exception:  # the values are there: how to show them is all that is lost
        return values, "percentile (window invalid)"
    if _clipped(values, shown, padding) > MAX_CLIPPED:
        return values, "percentile (window saturates)"
    return shown, "window"


def _valid_window(dataset: Dataset) -> bool:
    """Whether there is a pair of a finite centre and a width that is wide enough (DICOM PS3.3 C.11.2.1.2)."""
    try:
        centre, width = (float(np.atleast_1d(np.asarray(dataset[name].value, np.float64))[0])
                         for name in ("WindowCenter", "WindowWidth"))
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    exact = dataset.get("VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID")
    return math.isfinite(centre) and math.isfinite(width) and (width > 0 if exact else width >= 1)


def _clipped(values: np.ndarray, shown: np.ndarray, padding: np.ndarray | None) -> float:
    """Share of the picture whose different values a window shows as one, at either end.

    What shares the outermost value of all, as collimated ground does, loses nothing and does not count.
    """
    step = max(1, max(values.shape) // CLIPPING_SIDE)
    seen = np.s_[::step, ::step]
    inside = np.ones_like(values[seen], bool) if padding is None else ~padding[seen]
    before, after = values[seen][inside], shown[seen][inside]
    if not before.size:
        return 0.0
    lost = 0
    for end in {after.min(), after.max()}:
        merged = before[after == end]
        lost += merged.size - max((merged == merged.min()).sum(), (merged == merged.max()).sum())
    return float(lost) / before.size


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Which pixels are no part of the picture (PixelPaddingValue, or the range from it to PixelPaddingRangeLimit)."""
    try:
        ends = sorted(int(dataset[key].value) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit")
                      if key in dataset)
    except (TypeError, ValueError) as error:
        raise Refused("bad_header", "PixelPaddingValue or PixelPaddingRangeLimit is no number") from error
    if "PixelPaddingValue" not in dataset:
        return None
    padding = (stored >= ends[0]) & (stored <= ends[-1])
    return padding if padding.any() and not padding.all() else None
