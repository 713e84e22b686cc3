"""A pydicom plugin for JPEG Extended (Process 2 and 4) of 12 bits, by GDCM.

pydicom's own GDCM plugin refuses more than 8 bits, and the other decoder that pydicom knows, pylibjpeg-libjpeg, is
under the GPL. GDCM's values differ from libjpeg's by 1 at most. Importing this module registers the plugin.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import gdcm
from pydicom.pixels.decoders import JPEGExtended12BitDecoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import JPEGExtended12Bit

NAME = "gdcm_12_bit"
LOCK = threading.Lock()  # of the file descriptor


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop what C code writes to stderr: GDCM tries its 8-bit decoder first, whose libjpeg complains of each film."""
    with LOCK, open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def is_available(uid: str) -> bool:
    return uid == JPEGExtended12Bit


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """Decode one gray frame to little-endian words of 16 bits.  Raises ValueError for what is not of that kind."""
    if runner.samples_per_pixel != 1 or runner.bits_allocated != 16:
        raise ValueError("only one sample of 16 allocated bits a pixel is decoded")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    interpretation = gdcm.PhotometricInterpretation.GetPIType(str(runner.photometric_interpretation))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(interpretation))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    bits = runner.bits_stored
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, runner.pixel_representation))
    with silenced():
        frame = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM gives its char* as text
    if len(frame) != 2 * runner.rows * runner.columns:
        raise ValueError("the frame is not of the header's size")
    return frame


JPEGExtended12BitDecoder.add_plugin(NAME, (__name__, "decode_frame"))
