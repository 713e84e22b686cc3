"""Any tree of DICOM files, with or without a suffix: patient, study and view are what the header says.

Of all files those are read that have no suffix, a number (the end of a UID), .dcm, .dicom, .ima or .img. One counts as
DICOM by its first bytes, or by the suffix .dcm or .dicom. One whose header cannot be read is listed too, for decoding
to refuse with a reason; one whose header says that it is not wanted (`image.dicom_filter`) is listed with that reason,
and its pixels are never read. DICOMDIR is left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.storage import Folder
from pipelines.data.image import dicom_filter
from pipelines.data.image.picture import Refused
from pipelines.data.public_set import Card, HeaderSet, ListedImage, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.watched import WatchedFile
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    from pydicom import Dataset

CARD = Card(
    title="DICOM archive",
    images=0,
    where="its owner (any tree of DICOM files will do)",
    licence="its owner's",
    citation="",
)
TAGS = ["PatientID", "StudyInstanceUID", "ViewPosition"]
VIEWS = {"LL": "LATERAL", "RL": "LATERAL", "LAT": "LATERAL"}
NAMES = re.compile(r"[^.]*|.*\.(\d+|dcm|dicom|ima|img)", re.IGNORECASE)  # of files that may be DICOM


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Files that may be DICOM by their names: which of them are, and whose, `described` tells."""
    named = [path for path in tree.files if NAMES.fullmatch(path.rpartition("/")[2])]
    if others := len(tree.files) - len(named):
        say(f"{tree.root}: {others} files are left out: their suffix is none of .dcm, .dicom, .ima, .img and numbers")
    return (ListedImage(path) for path in named if path.rpartition("/")[2].upper() != "DICOMDIR")


class _Stream(io.BufferedReader):
    """A file of any file system, read in blocks."""

    name = ""  # pydicom asks for it


def described(folder: Folder, path: str, settings: DataSettings) -> ListedImage | None:
    """What the header of one file says, or None where the file is no DICOM object; raises as `read_header_of` does."""
    found = read_header_of(folder, path, settings)
    return found and found[0]


def read_header_of(folder: Folder, path: str, settings: DataSettings,
                   key: str = "SOPInstanceUID") -> tuple[ListedImage, str] | None:
    """What the header of one file says, and one more element of it; None where the file is no DICOM object.

    Args:
        folder: that the path is relative to.
        path: of the file.
        settings: which objects are wanted.
        key: keyword of the element; "" where the header has none, or cannot be read.

    Raises:
        OSError: the storage failed.
        MemoryError: there is not enough of it.
    """
    from pipelines.data.image.dicom import read_header

    with WatchedFile(folder, path) as file:
        stream = _Stream(file, 1 << 16)
        head = stream.read(132)
        if not (head[128:] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00")  # the first group, with no head
                or path.lower().endswith((".dcm", ".dicom"))):
            return None
        stream.seek(0)
        try:
            header = read_header(stream, stop_before_pixels=True, specific_tags=[*TAGS, key, *dicom_filter.TAGS])
            patient, study, view = (str(header.get(tag) or "").strip() or None for tag in TAGS)
            image = ListedImage(path, patient=patient, study=study, refused=_refused(header, settings),
                          view=VIEWS.get(view.upper(), view.upper()) if view else None)
            return image, str(header.get(key) or "").strip()
        except MemoryError:  # says nothing against the file, which without its header would be another patient's
            raise
        except Exception:  # pydicom's parser raises many kinds, OSError too
            if file.fault:
                raise file.fault from None
            return ListedImage(path), ""


def _refused(header: Dataset, settings: DataSettings) -> str | None:
    try:
        dicom_filter.refuse_unwanted(header, settings)
    except Refused as refused:
        return refused.reason
    return None


SOURCE = HeaderSet(CARD, images, described)
