"""Any tree of DICOM files, with or without a suffix: patient, study and view are what the header says.

A file counts as DICOM by its first bytes, or by the suffix .dcm or .dicom. One whose header cannot be read is listed
too, for decoding to refuse with a reason. DICOMDIR is left out.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipelines.data.public_set import Card, Image, Published, Tree
from pipelines.data.settings import Data

CARD = Card(
    title="DICOM archive",
    images=0,
    where="its owner (any tree of DICOM files will do)",
    licence="its owner's",
    citation="",
)
TAGS = ["PatientID", "StudyInstanceUID", "ViewPosition"]
VIEWS = {"LL": "LATERAL", "RL": "LATERAL", "LAT": "LATERAL"}
THREADS = 16


def images(tree: Tree, settings: Data) -> Iterator[Image]:
    """Labels and splits are not told."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda path: _image(tree, path), tree.files)
        yield from (image for image in found if image)


class _Stream(io.BufferedReader):
    """A file of any file system, read in blocks."""

    name = ""  # pydicom asks for it


def _image(tree: Tree, path: str) -> Image | None:
    from pipelines.data.image.dicom import read_header

    if path.rsplit("/", 1)[-1].upper() == "DICOMDIR":
        return None
    try:
        with tree.folder.filesystem.open_input_file(f"{tree.folder.path}/{path}") as file:
            stream = _Stream(file, 1 << 16)
            head = stream.read(132)
            if not (head[128:] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00")  # the first group, with no head
                    or path.lower().endswith((".dcm", ".dicom"))):
                return None
            stream.seek(0)
            header = read_header(stream, stop_before_pixels=True, specific_tags=TAGS)
            patient, study, view = (str(header.get(tag) or "").strip() or None for tag in TAGS)
    except Exception:  # pydicom raises many kinds
        return Image(path)
    return Image(path, patient=patient, study=study, view=VIEWS.get(view.upper(), view.upper()) if view else None)


SOURCE = Published(CARD, images)
