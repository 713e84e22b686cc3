"""A folder of images: `[train|val|test/][class/]image`, of JPEG, PNG, TIFF and DICOM in any mix.

Classes exclude each other: an image of one is none of the others. The findings of an image outside a class folder are
unknown. Folders that name the patients (see `data.patient_regex`) are not classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from pipelines.data.files import IMAGE_SUFFIXES, listing, manifest_table, read_image
from pipelines.data.findings import finding_columns
from pipelines.data.own_table import SPLIT_NAMES
from pipelines.data.settings import DataSettings
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded


MANY_CLASSES, FEW_IMAGES = 20, 10  # more folders than that with fewer images each look like patients


def manifest(settings: DataSettings, seed: int) -> pa.Table:
    """One row per image file.

    Raises:
        UserError: there is none, patient_regex fits none, or the folders look like patients and it is not set.
    """
    root = _root(settings)
    sizes = _images(root)
    paths = list(sizes)
    patients = _patients(paths, settings.patient_regex)
    labels = _labels(paths, patients, settings.patient_regex)
    classes = sorted({label for label in labels if label})

    def rows() -> Iterator[dict[str, Any]]:
        for path, patient, label in zip(paths, patients, labels, strict=True):
            split, _ = _place(path)
            yield {"source": "folder", "uri": f"{root}/{path}", "path": path, "patient_id": patient,
                   "study_id": None, "view": None, "split": split, "masks": [], "bytes": sizes[path],
                   **finding_columns("folder", [label] if label else [], assessed=classes if label else [])}

    return manifest_table(rows())


def load(row: Mapping[str, Any], settings: DataSettings) -> Decoded:
    return read_image(_root(settings), row["path"], row, settings)


def _root(settings: DataSettings) -> str:
    if not settings.root:
        raise UserError("data=folder needs data.root=PATH")
    return settings.root


def _images(root: str) -> dict[str, int]:
    """Bytes of every image file by relative path, in order of path; ValueError when there is none."""
    images = {path: size for path, size in listing(root).items() if path.lower().endswith(IMAGE_SUFFIXES)}
    if not images:
        raise UserError(f"data.root={root!r} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _place(path: str) -> tuple[str | None, str | None]:
    """Split and class that a relative path tells."""
    *folders, _ = path.split("/")
    split = SPLIT_NAMES.get(folders[0].lower()) if folders else None
    classes = folders[1:] if split else folders
    return split, classes[0] if len(classes) == 1 else None


def _labels(paths: list[str], patients: list[str], regex: str | None) -> list[str | None]:
    """The class of each image; none at all where the folders in the place of classes are the patients."""
    labels = [_place(path)[1] for path in paths]
    labelled = [(label, patient) for label, patient in zip(labels, patients, strict=True) if label]
    if regex and labelled and all(label == patient for label, patient in labelled):
        return [None] * len(paths)
    classes = len({label for label, _ in labelled})
    if regex is None and classes > MANY_CLASSES and len(labelled) < FEW_IMAGES * classes:
        raise UserError(f"data.root holds {classes} folders of {len(labelled)} images, such as {labelled[0][0]!r}: "
                        "these look like patients, not like findings; if they are, set "
                        r"data.patient_regex='([^/]+)/[^/]+$', else data.patient_regex='.*' (each image a patient)")
    return labels


def _patients(paths: list[str], regex: str | None) -> list[str]:
    if regex is None:
        say("data.patient_regex is not set: each image counts as a patient of its own")
        return paths
    found = [_patient(path, regex) for path in paths]
    missed = [path for path, patient in zip(paths, found, strict=True) if patient is None]
    if len(missed) == len(paths):
        raise UserError(f"data.patient_regex={regex!r} fits no path under data.root, for one {paths[0]!r}")
    if missed:
        say(f"data.patient_regex fits all but {len(missed)} paths (for one {missed[0]!r}); each of these counts as a "
            "patient of its own")
    return [patient or path for path, patient in zip(paths, found, strict=True)]


def _patient(path: str, regex: str) -> str | None:
    match = re.search(regex, path)
    return match and ("-".join(g for g in match.groups() if g is not None) or match.group(0))
