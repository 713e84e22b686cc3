"""A folder of images: `[train|val|test/][class/]image`, of JPEG, PNG, TIFF and DICOM in any mix."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from cluster.storage import Folder
from pipelines.progress import say
from pipelines.settings import Data

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.decode import Decoded

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
               "testing": "test"}


def contents(settings: Data) -> str:
    """Hash of all relative paths and sizes."""
    text = "\n".join(f"{path} {size}" for path, size in _listing(_root(settings)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def manifest(settings: Data, seed: int) -> pa.Table:
    """One row per image file.  Raises ValueError when there is none, or when patient_regex fits none."""
    import pyarrow as pa

    from pipelines.data.records import MANIFEST

    root = _root(settings)
    paths = sorted(sorted((path for path, _ in _listing(root)), key=_shuffled)[: settings.images])
    patients = _patients(paths, settings.patient_regex)
    rows = [
        {"source": "folder", "uri": f"{root}/{path}", "path": path, "patient_id": patient, "study_id": None,
         "view": None, **dict(zip(("split", "labels"), _place(path), strict=True))}
        for path, patient in zip(paths, patients, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def load(uri: str, settings: Data) -> Decoded:
    from pipelines.data.decode import Refused, decode

    root = _root(settings)
    try:
        content = _folder(root).read(uri[len(root) + 1 :])
    except OSError as error:
        raise Refused("unreadable", str(error)) from error
    return decode(content, settings)


def _root(settings: Data) -> str:
    if not settings.root:
        raise ValueError("data=folder needs data.root=PATH")
    return settings.root


@lru_cache(maxsize=8)
def _folder(root: str) -> Folder:
    """One connection for all images of a root."""
    return Folder(root)


def _listing(root: str) -> list[tuple[str, int]]:
    """Relative path and size of every image file that is not hidden, sorted by path; ValueError when there is none."""
    from pyarrow.fs import FileSelector, FileType

    folder = _folder(root)
    try:
        found = folder.filesystem.get_file_info(FileSelector(folder.path, recursive=True))
        files = [(f.path[len(folder.path) :].strip("/"), f.size) for f in found if f.type == FileType.File]
    except OSError as error:
        raise ValueError(f"data.root={root!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data.root={root!r} holds a file whose name is not UTF-8: {error.object!r}") from error
    images = sorted((path, size) for path, size in files
                    if path.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in path.split("/")))
    if not images:
        raise ValueError(f"data.root={root!r} holds no image ({', '.join(SUFFIXES)})")
    return images


def _shuffled(path: str) -> str:
    """Sort key by which the first `data.images` are a fair draw from all folders, the same whatever else there is."""
    return hashlib.sha256(path.encode()).hexdigest()


def _place(path: str) -> tuple[str | None, list[str]]:
    """Split and labels that a relative path tells."""
    *folders, _ = path.split("/")
    split = SPLIT_NAMES.get(folders[0].lower()) if folders else None
    classes = folders[1:] if split else folders
    return split, classes if len(classes) == 1 else []


def _patients(paths: list[str], regex: str | None) -> list[str]:
    if regex is None:
        say("data.patient_regex is not set: each image counts as a patient of its own")
        return paths
    found = [_patient(path, regex) for path in paths]
    missed = [path for path, patient in zip(paths, found, strict=True) if patient is None]
    if len(missed) == len(paths):
        raise ValueError(f"data.patient_regex={regex!r} fits no path under data.root, for one {paths[0]!r}")
    if missed:
        say(f"data.patient_regex fits all but {len(missed)} paths (for one {missed[0]!r}); each of these counts as a "
            "patient of its own")
    return [patient or path for path, patient in zip(paths, found, strict=True)]


def _patient(path: str, regex: str) -> str | None:
    match = re.search(regex, path)
    return match and ("-".join(g for g in match.groups() if g is not None) or match.group(0))
