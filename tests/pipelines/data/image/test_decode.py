import contextlib
import io
import random
import struct
import time
import tracemalloc
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    MPEG2MPML,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    RLELossless,
)

from pipelines.data.image import picture
from pipelines.data.image.decode import decode
from pipelines.data.image.picture import Refused
from pipelines.graph.compose import load_settings

SIDE = 48
PICTURE = (np.add.outer(np.arange(SIDE), 3 * np.arange(SIDE)) / (4 * SIDE - 4) * 255).astype(np.uint8)
PICTURE[:3], PICTURE[-3:] = 0, 255  # so that stretching its percentiles changes nothing


@pytest.fixture(scope="module")
def settings():
    return load_settings("data.size=32").data


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom and Pillow warn of what these tests break on purpose
        yield


def encoded(image, kind, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def dicom(pixels=None, syntax=ExplicitVRLittleEndian, head=True, **elements) -> bytes:
    """A DICOM file of these stored values."""
    pixels = (PICTURE.astype(np.uint16) * 16) if pixels is None else pixels
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if not head else ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = dataset.BitsAllocated, dataset.BitsAllocated - 1
    dataset.PixelRepresentation = 0
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax != ExplicitVRLittleEndian and head:
        dataset.compress(syntax, generate_instance_uid=False)
    buffer = io.BytesIO()
    if head:
        dataset.save_as(buffer, enforce_file_format=True)
    else:
        dataset.file_meta = FileMetaDataset()
        dataset.save_as(buffer, implicit_vr=True, little_endian=True)
    return buffer.getvalue()


def palette_picture() -> Image.Image:
    """The picture behind a palette that turns the indices round, so that an index is not taken for its gray."""
    image = Image.new("P", (SIDE, SIDE))
    image.putdata((255 - PICTURE).ravel().tolist())
    image.putpalette([level for k in range(256) for level in (255 - k,) * 3])
    return image


READ = {
    "png": lambda: encoded(PICTURE, "PNG"),
    "jpeg": lambda: encoded(PICTURE, "JPEG", quality=95),
    "colour jpeg": lambda: encoded(Image.fromarray(PICTURE).convert("RGB"), "JPEG", quality=95),
    "cmyk jpeg": lambda: encoded(Image.fromarray(PICTURE).convert("RGB").convert("CMYK"), "JPEG", quality=95),
    "progressive jpeg": lambda: encoded(PICTURE, "JPEG", quality=95, progressive=True),
    "16-bit png": lambda: encoded(PICTURE.astype(np.uint16) * 100 + 500, "PNG"),
    "palette png": lambda: encoded(palette_picture(), "PNG"),
    "rgba png": lambda: encoded(Image.fromarray(PICTURE).convert("RGBA"), "PNG"),
    "gray and alpha png": lambda: encoded(Image.fromarray(PICTURE).convert("LA"), "PNG"),
    "tiff": lambda: encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "float tiff": lambda: encoded(PICTURE.astype(np.float32) / 7, "TIFF"),
    "bmp": lambda: encoded(PICTURE, "BMP"),
    "dicom": dicom,
    "dicom jpeg 2000": lambda: dicom(syntax=JPEG2000Lossless),
    "dicom rle": lambda: dicom(syntax=RLELossless),
    "dicom without head": lambda: dicom(head=False),
    "dicom monochrome1": lambda: dicom(4095 - PICTURE.astype(np.uint16) * 16, PhotometricInterpretation="MONOCHROME1"),
    "dicom rescaled": lambda: dicom(RescaleSlope="-1", RescaleIntercept="4095",
                                    pixels=4095 - PICTURE.astype(np.uint16) * 16),
    "dicom window": lambda: dicom(WindowCenter="2040", WindowWidth="4080"),
    "dicom 8 bit": lambda: dicom(PICTURE),
    "dicom colour": lambda: dicom(np.stack([PICTURE] * 3, -1), SamplesPerPixel=3, PhotometricInterpretation="RGB",
                                  PlanarConfiguration=0),
    "dicom palette": lambda: dicom(
        255 - PICTURE, PhotometricInterpretation="PALETTE COLOR",
        **{f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 16] for colour in ("Red", "Green", "Blue")},
        **{f"{colour}PaletteColorLookupTableData": (np.arange(255, -1, -1, np.uint16) * 257).tobytes()
           for colour in ("Red", "Green", "Blue")}),
}


@pytest.mark.parametrize("kind", READ)
def test_every_kind_gives_the_same_picture(settings, kind):
    expected = decode(encoded(PICTURE, "PNG"), settings).image.astype(int)
    decoded = decode(READ[kind](), settings)
    assert decoded.image.dtype == np.uint8
    assert decoded.image.shape == (32, 32)
    assert (decoded.width, decoded.height) == (SIDE, SIDE)
    assert np.abs(decoded.image - expected).mean() < 1.5


def test_the_centre_square_is_kept_and_the_original_size_told(settings):
    wide = np.zeros((40, 120), np.uint8)
    wide[:, 40:80] = np.arange(40)[:, None] * 6 + 10
    for content in (encoded(wide, "PNG"), encoded(wide.T.copy(), "PNG")):
        decoded = decode(content, settings)
        assert decoded.image.min() > 0, "nothing of the borders is left"
        assert {decoded.width, decoded.height} == {120, 40}
    assert (decoded.width, decoded.height) == (40, 120)


def test_a_large_jpeg_tells_its_original_size(settings):
    decoded = decode(encoded(Image.fromarray(PICTURE).resize((800, 600)), "JPEG"), settings)
    assert (decoded.width, decoded.height) == (800, 600)


def test_the_digest_is_of_the_content(settings):
    one, other = encoded(PICTURE, "PNG"), encoded(PICTURE, "PNG", compress_level=1)
    assert decode(one, settings).sha256 == decode(one, settings).sha256 != decode(other, settings).sha256


def png_header(width: int, height: int) -> bytes:
    """A valid PNG of zeros whose pixel data is one short, highly compressed chunk."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
            + chunk(b"IEND", b""))


def noise(kind: str) -> bytes:
    return encoded(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8), kind)


REFUSED = {
    "empty": (lambda: b"", "empty_file"),
    "text": (lambda: b"this is no image at all\n" * 20, "not_an_image"),
    "one byte": (lambda: b"\x89", "not_an_image"),
    "a web page": (lambda: b"<!DOCTYPE html><html>404</html>", "not_an_image"),
    "postscript": (lambda: encoded(PICTURE, "EPS"), "not_an_image"),  # Pillow would run a program on it
    "truncated jpeg": (lambda: noise("JPEG")[:-1500], "truncated"),
    "truncated png": (lambda: noise("PNG")[:-1500], "truncated"),
    "header of a png": (lambda: noise("PNG")[:30], {"truncated", "not_an_image"}),
    "lab tiff": (lambda: encoded(Image.merge("LAB", [Image.fromarray(PICTURE)] * 3), "TIFF"), "unsupported"),
    "1x1": (lambda: encoded(np.zeros((1, 1), np.uint8), "PNG"), "too_small"),
    "15 pixels wide": (lambda: encoded(PICTURE[:, :15], "PNG"), "too_small"),
    "constant": (lambda: encoded(np.full((64, 64), 77, np.uint8), "PNG"), "constant"),
    "constant jpeg": (lambda: encoded(np.full((64, 64), 77, np.uint8), "JPEG"), "constant"),
    "constant 16-bit": (lambda: encoded(np.full((64, 64), 777, np.uint16), "PNG"), "constant"),
    "bomb": (lambda: png_header(20_000, 20_000), "too_large"),
    "dicom bomb": (lambda: dicom(Rows=20_000, Columns=20_000), "too_large"),
    "dicom with little data": (lambda: dicom(Rows=400), "truncated"),
    "cut dicom": (lambda: dicom()[:-1000], {"truncated", "not_an_image"}),
    "head of a dicom": (lambda: dicom()[:200], "not_an_image"),
    "dicom mark only": (lambda: bytes(128) + b"DICM", "not_an_image"),
    "dicom mark and rubbish": (lambda: bytes(128) + b"DICM" + bytes(range(256)) * 20, "not_an_image"),
    "small dicom": (lambda: dicom(np.zeros((4, 4), np.uint16)), "too_small"),
    "constant dicom": (lambda: dicom(np.full((64, 64), 5, np.uint16)), "constant"),
    "many frames": (lambda: dicom(np.stack([PICTURE] * 5), Rows=SIDE, Columns=SIDE, NumberOfFrames=5), "unsupported"),
    "many frames said": (lambda: dicom(NumberOfFrames=2_000_000_000), "unsupported"),
    "dicom without rows": (lambda: dicom(Rows=None), "not_an_image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_reason(settings, kind):
    make, reasons = REFUSED[kind]
    content = make()
    with pytest.raises(Refused) as refused:
        decode(content, settings)
    assert refused.value.reason in ({reasons} if isinstance(reasons, str) else reasons)
    assert str(refused.value), "the detail says more"


def lut(name: str, descriptor: list, data: bytes | None) -> dict:
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    if data is not None:
        item.add_new("LUTData", "OW", data)
    return {name: pydicom.Sequence([item])}


CAUSES = {
    "cut pixels": (lambda: dicom()[:-1000], "truncated"),
    "cut jpeg 2000": (lambda: dicom(syntax=JPEG2000Lossless)[:-300], "truncated"),
    "no pixels": (lambda: dicom(PixelData=b""), "truncated"),
    "damaged rle": (lambda: dicom(syntax=RLELossless).replace(RLE_START, b"\xff" * len(RLE_START)), "decoder_error"),
    "no bits": (lambda: dicom(BitsStored=None), "bad_header"),
    "too many bits": (lambda: dicom(BitsStored=17), "bad_header"),
    "no interpretation": (lambda: dicom(PhotometricInterpretation=None), "bad_header"),
    "bad modality table": (lambda: dicom(**lut("ModalityLUTSequence", [0, 0], b"")), "bad_lut"),
    "no palette": (lambda: dicom(PICTURE, PhotometricInterpretation="PALETTE COLOR"), "bad_lut"),
    "slope is no number": (lambda: dicom(RescaleSlope="1e999", RescaleIntercept="0"), "bad_header"),
}
RLE_START = struct.pack("<LL", 2, 64)  # segments of a frame, and where the first begins


@pytest.mark.parametrize("kind", CAUSES)
def test_the_cause_is_named(settings, kind):
    make, reason = CAUSES[kind]
    content = make()
    with pytest.raises(Refused) as refused:
        decode(content, settings)
    assert refused.value.reason == reason


@pytest.mark.parametrize("elements", [
    {"WindowCenter": "2040", "WindowWidth": "0"}, {"WindowCenter": "2040", "WindowWidth": "-5"}, {"WindowWidth": "400"},
    {"WindowCenter": "2040"}, {"WindowCenter": "", "WindowWidth": "400"}, {"WindowCenter": "1e999", "WindowWidth": "9"},
    lut("VOILUTSequence", [16, 0, 8], None),
])
def test_an_invalid_window_gives_way_to_percentiles(settings, elements):
    decoded, plain = decode(dicom(**elements), settings), decode(dicom(), settings)
    assert decoded.mapping == "percentile (window invalid)"
    assert np.array_equal(decoded.image, plain.image)


@pytest.mark.parametrize(("centre", "width", "mapping"), [
    (15000, 30000, "window"), (12000, 15000, "window"),
    (200, 300, "percentile (window saturates)"), (30000, 20, "percentile (window saturates)"),
    (15000, 500, "percentile (window saturates)"),
])
def test_a_window_that_saturates_a_real_film_gives_way_to_percentiles(settings, real_data, centre, width, mapping):
    dataset = pydicom.dcmread(real_data("dicom") / "RG1_UNCR.dcm")
    own = decode((real_data("dicom") / "RG1_UNCR.dcm").read_bytes(), settings).image.astype(int)
    dataset.WindowCenter, dataset.WindowWidth = centre, width
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    decoded = decode(buffer.getvalue(), settings)
    assert decoded.mapping == mapping
    assert np.abs(decoded.image - own).mean() < 40, "the film can be seen"


def test_collimated_ground_does_not_count_as_saturated(settings):
    pixels = np.zeros((100, 100), np.uint16)
    pixels[20:68, 20:68] = PICTURE.astype(np.uint16) * 15 + 100
    assert decode(dicom(pixels, WindowCenter="2000", WindowWidth="3800"), settings).mapping == "window"


@pytest.mark.parametrize(("name", "modality"), [("JPGExtended.dcm", "CR"), ("JPGExtended.dcm", "DX"),
                                                ("JPEG-lossy.dcm", "CR")])
def test_jpeg_extended_of_12_bits_is_read(settings, capfd, name, modality):
    """pydicom's own test files, relabelled: they are scintigrams of 12 bits."""
    dataset = pydicom.dcmread(get_testdata_file(name))
    assert (dataset.file_meta.TransferSyntaxUID, dataset.BitsStored) == (JPEGExtended12Bit, 12)
    dataset.Modality = modality
    dataset.SOPClassUID = {"CR": "1.2.840.10008.5.1.4.1.1.1", "DX": "1.2.840.10008.5.1.4.1.1.1.1"}[modality]
    dataset.NumberOfFrames = 1
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    decoded = decode(buffer.getvalue(), settings)
    assert (decoded.width, decoded.height) == (256, 1024)
    assert decoded.image.std() > 10
    assert abs(int(dataset.pixel_array.max()) - 264) <= 1, "what libjpeg gives, too"
    assert capfd.readouterr().err == ""


STORAGE = "1.2.840.10008.5.1.4.1.1."
NOT_WANTED = {
    "report": ({"SOPClassUID": STORAGE + "88.11", "Modality": "SR"}, "not_an_image_object"),
    "presentation state": ({"SOPClassUID": STORAGE + "11.1", "Modality": "PR"}, "not_an_image_object"),
    "key objects": ({"SOPClassUID": STORAGE + "88.59", "Modality": "KO"}, "not_an_image_object"),
    "plan": ({"SOPClassUID": STORAGE + "481.5", "Modality": "RTPLAN"}, "not_an_image_object"),
    "contours": ({"SOPClassUID": STORAGE + "481.3", "Modality": "RTSTRUCT"}, "not_an_image_object"),
    "segmentation": ({"SOPClassUID": STORAGE + "66.4", "Modality": "SEG"}, "not_an_image_object"),
    "pdf": ({"SOPClassUID": STORAGE + "104.1", "Modality": "DOC"}, "not_an_image_object"),
    "mammogram": ({"SOPClassUID": STORAGE + "1.2", "Modality": "MG"}, "not_a_radiograph"),
    "angiogram": ({"SOPClassUID": STORAGE + "12.1", "Modality": "XA"}, "not_a_radiograph"),
    "photograph": ({"SOPClassUID": STORAGE + "77.1.4", "Modality": "XC"}, "not_a_radiograph"),
    "endoscopy": ({"SOPClassUID": STORAGE + "77.1.1", "Modality": "ES"}, "not_a_radiograph"),
    "fundus": ({"SOPClassUID": STORAGE + "77.1.5.1", "Modality": "OP"}, "not_a_radiograph"),
    "slide": ({"SOPClassUID": STORAGE + "77.1.6", "Modality": "SM"}, "not_a_radiograph"),
    "captured CT": ({"SOPClassUID": STORAGE + "7", "Modality": "CT"}, "not_a_radiograph"),
    "raw class": ({"SOPClassUID": STORAGE + "1.1.1", "Modality": "DX"}, "not_for_presentation"),
    "raw": ({"SOPClassUID": STORAGE + "1.1", "Modality": "DX", "PresentationIntentType": "FOR PROCESSING"},
            "not_for_presentation"),
}


@pytest.mark.parametrize("kind", NOT_WANTED)
@pytest.mark.parametrize("pixels", [True, False])
def test_other_objects_are_not_wanted_and_not_bad(settings, kind, pixels):
    elements, reason = NOT_WANTED[kind]
    content = dicom(**elements, **({} if pixels else {"Rows": None, "Columns": None, "PixelData": None}))
    with pytest.raises(Refused) as refused:
        decode(content, settings)
    assert refused.value.reason == reason
    assert reason in picture.NOT_WANTED


@pytest.mark.parametrize("part", [
    None, "", "CHEST", "Chest PA", "THORAX", "T\xd3RAX", "TORAX", "Torace", "LUNG", "RIB", "RIBS LEFT",
    "CHEST_TO_PELVIS", "CHESTABDOMEN", "ABDOMEN CHEST", "CHESTABDPELVIS", "WHOLEBODY", "BABYGRAM", "PORT CHEST",
    "STERNUM", "POUMONS", "UNKNOWN", "DEFAULT", "1", "HEART", "Brustkorb",
])
def test_chests_and_what_is_not_named_are_kept(settings, part):
    elements = {} if part is None else {"BodyPartExamined": part, "SpecificCharacterSet": "ISO_IR 100"}
    assert decode(dicom(Modality="CR", **elements), settings).image.shape == (32, 32)


@pytest.mark.parametrize("part", [
    "HAND", "Hand PA", "FOOT", "KNEE", "KNEE_LEFT", "LSPINE", "TSPINE", "CSPINE", "THORACIC SPINE", "EXTREMITY",
    "SKULL", "PELVIS", "HIP", "ABDOMEN", "ABD", "SHOULDER", "CLAVICLE", "WRIST", "ANKLE", "LEG", "UP_EXM", "Sch\xe4del",
    "RODILLA", "Wirbels\xe4ule", "BREAST", "HEAD", "FINGER", "RHAND", "LFOOT", "L KNEE",
])
def test_other_parts_of_the_body_are_left_out_unless_asked_for(settings, part):
    content = dicom(Modality="DX", BodyPartExamined=part, SpecificCharacterSet="ISO_IR 100")
    with pytest.raises(Refused) as refused:
        decode(content, settings)
    assert refused.value.reason == "not_a_chest"
    assert decode(content, replace(settings, chest_only=False)).image.shape == (32, 32)


def test_the_region_stands_in_for_the_body_part(settings):
    region = pydicom.Dataset()
    region.CodeMeaning = "Knee joint"
    with pytest.raises(Refused):
        decode(dicom(Modality="DX", AnatomicRegionSequence=pydicom.Sequence([region])), settings)


def test_no_refusal_quotes_the_header(settings):
    """Even where the parser's own error would: whatever value is broken, and by whatever text."""
    whole = dicom(PatientName="DOE^JOHN", BodyPartExamined="DOE^JOHN", Modality="DOE^JOHN", WindowCenter="1",
                  WindowWidth="1")
    for at in range(0, len(whole) - PICTURE.size * 2, 3):
        broken = whole[:at] + b"DOE^JOHN" + whole[at + 8 :]
        details = []
        try:
            decode(broken, settings)
        except Refused as refused:
            details.append(str(refused))
        assert "DOE" not in "".join(details), at


def test_a_transfer_syntax_without_decoder_is_named(settings):
    dataset = pydicom.dcmread(io.BytesIO(dicom(syntax=RLELossless)))
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    with pytest.raises(Refused, match="MPEG2") as refused:
        decode(buffer.getvalue(), settings)
    assert refused.value.reason == "no_decoder"


@pytest.mark.parametrize("kind", ["bomb", "dicom bomb", "many frames said"])
def test_a_bomb_is_refused_before_it_unfolds(settings, kind):
    content = REFUSED[kind][0]()
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(Refused):
        decode(content, settings)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 50 << 20
    import resource

    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused):
        decode(content, settings)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit < 100 << 10, "KiB that Pillow itself took"


@pytest.mark.parametrize("kind", READ)
def test_broken_bytes_are_refused_or_read_but_raise_nothing_else(settings, kind):
    content, chance = READ[kind](), random.Random(kind)
    for trial in range(60):
        broken = bytearray(content[: chance.randrange(len(content))] if trial % 3 == 0 else content)
        if trial % 3:
            end = len(broken) if trial % 3 == 1 else min(len(broken), 800)
            for _ in range(chance.choice([1, 2, 5, 20])):
                broken[chance.randrange(end)] = chance.choice([0, 255, chance.randrange(256)])
        with contextlib.suppress(Refused):
            assert decode(bytes(broken), settings).image.shape == (32, 32)


def test_one_radiograph_in_four_transfer_syntaxes_is_one_picture(settings, real_data):
    folder = real_data("dicom")
    pictures = {name: decode((folder / f"RG1_{name}.dcm").read_bytes(), settings)
                for name in ("UNCR", "J2KR", "JLSN", "J2KI")}
    plain = pictures["UNCR"].image.astype(int)
    assert plain.std() > 20
    for name, decoded in pictures.items():
        assert (decoded.width, decoded.height) == (pictures["UNCR"].width, pictures["UNCR"].height)
        limit = 0 if name in ("UNCR", "J2KR") else 2  # the others are lossy
        assert np.abs(decoded.image - plain).max() <= limit, name
    assert len({decoded.sha256 for decoded in pictures.values()}) == 4


def test_monochrome1_is_turned_round_so_that_lungs_are_dark(settings, real_data):
    image = decode((real_data("dicom") / "RG1_UNCR.dcm").read_bytes(), settings).image
    other = decode((real_data("dicom") / "NIH_DX.dcm").read_bytes(), settings).image
    for chest in (image, other):  # bone and heart in the middle, lungs on both sides
        assert chest[12:20, 15:17].mean() > chest[12:20, 8:12].mean()


@pytest.mark.parametrize(("name", "reasons"), [
    ("bad_sequence", {"not_a_radiograph"}), ("emri_small_jpeg_2k_lossless_too_short", {"not_a_radiograph"}),
    ("RG3_J2KI", {"not_a_chest"}),
])
def test_real_dicoms_are_refused(settings, real_data, name, reasons):
    with pytest.raises(Refused) as refused:
        decode((real_data("dicom") / f"{name}.dcm").read_bytes(), settings)
    assert refused.value.reason in reasons


@pytest.mark.parametrize("name", ["NIH_DX", "SC_rgb_16bit", "vlut_04", "mlut_18", "OT-PAL-8-face"])
def test_real_dicoms_are_read(settings, real_data, name):
    assert decode((real_data("dicom") / f"{name}.dcm").read_bytes(), settings).image.std() > 5
