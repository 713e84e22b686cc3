"""DICOM pixels: every transfer syntax in use for radiographs, look-up tables, windows, padding and inverted grays.

What leaves ingest of a DICOM file is its pixels, Modality where it is refused for that, and, through `sources.dicom`,
PatientID and StudyInstanceUID as salted hashes and ViewPosition.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cluster.errors import UserError
from pipelines.data.image.picture import Picture, Refused, check_size, to_8bit
from pipelines.data.settings import Data

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

CROSS_SECTIONAL = ("CT", "MR", "PT", "NM", "US")  # modalities whose images are no projections of the body


def is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM" or content[:2] in (b"\x02\x00", b"\x08\x00")  # the first group, with no head


def read_header(stream: Any, **options: Any) -> Dataset:
    """`pydicom.dcmread` of a file with or without a head; values against DICOM's rules are common, and not told."""
    from pydicom import config, dcmread

    config.settings.reading_validation_mode = config.IGNORE
    return dcmread(stream, force=True, **options)


def read_dicom(content: bytes, settings: Data) -> Picture:
    """One frame as gray.  Raises Refused: not_an_image, not_a_radiograph, truncated, unsupported, too_*."""
    from pydicom.pixels import apply_color_lut

    dataset, width, height = _header(content)
    check_size(width, height, settings)
    try:
        stored = dataset.pixel_array
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)
        if stored.ndim == 3:
            gray, mapping = to_8bit(stored[..., :3].astype(np.float32).mean(-1)), "percentile"
        else:
            gray, mapping = _gray(stored, dataset)
    except Exception as error:  # pydicom's decoders raise many kinds
        raise Refused("truncated", f"pixel data cannot be decoded ({type(error).__name__})") from error
    return Picture(Image.fromarray(gray), width, height, mapping)


def _header(content: bytes) -> tuple[Dataset, int, int]:
    from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    try:
        dataset = read_header(io.BytesIO(content))
        if "Columns" not in dataset or "Rows" not in dataset:
            raise UserError("its header holds none, or breaks off")
        width, height, frames = int(dataset.Columns), int(dataset.Rows), int(dataset.get("NumberOfFrames") or 1)
        if not dataset.file_meta.get("TransferSyntaxUID"):  # written before files had a head of their own
            implicit = dataset.original_encoding[0]
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    except Exception as error:
        raise Refused("not_an_image", f"DICOM without a readable image: {error}") from error
    if dataset.get("Modality") in CROSS_SECTIONAL:
        raise Refused("not_a_radiograph", f"its modality is {dataset.Modality}")
    if frames != 1:
        raise Refused("unsupported", f"{frames} frames; one is read")
    if not _can_decode(syntax):
        raise Refused("unsupported", f"no decoder is installed for the transfer syntax {syntax.name}")
    return dataset, width, height


def _can_decode(syntax: UID) -> bool:
    from pydicom.pixels import get_decoder

    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _gray(stored: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, str]:
    """Stored values (H, W) to uint8, and how they were mapped; of several windows or tables the first counts."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    padding = _padding(stored, dataset)
    values = np.asarray(apply_modality_lut(stored, dataset))
    shown = np.asarray(apply_voi_lut(values, dataset, index=0)).astype(np.float32)
    picture = shown if padding is None else shown[~padding]
    windowed = dataset.get("VOILUTSequence") or (dataset.get("WindowCenter") is not None and dataset.get("WindowWidth"))
    mapping = "window" if windowed else "percentile"
    if mapping == "window" and picture.size and picture.min() == picture.max():  # a window beside the picture
        shown, mapping = values.astype(np.float32), "percentile"
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        shown = shown.max() - shown
    return to_8bit(shown, padding), mapping


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Which pixels are no part of the picture (PixelPaddingValue, or the range from it to PixelPaddingRangeLimit)."""
    if "PixelPaddingValue" not in dataset:
        return None
    ends = sorted(int(dataset[key].value) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit") if key in dataset)
    padding = (stored >= ends[0]) & (stored <= ends[-1])
    return padding if padding.any() and not padding.all() else None
