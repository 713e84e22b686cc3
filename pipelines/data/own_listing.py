"""The files that a user's list names, found by one listing of the folder that they lie in."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.faults import holds_something
from pipelines.data.files import connect, listing
from pipelines.data.own_set import OwnSet
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import pyarrow as pa


def check_folder(described: OwnSet) -> None:
    """Raise UserError where the folder of the images is missing, or empty as a mount point without its mount is."""
    if not holds_something(connect(described.folder())):
        raise UserError(f"{described.table}: its images={described.folder()!r} is not there, or is empty; check "
                        "the key images, or the mount")


def with_bytes(listed: pa.Table, described: OwnSet) -> pa.Table:
    """The rows with the `bytes` of each file and its masks; null where it is missing, or lies outside the set's folder.

    Args:
        listed: manifest of the list.
        described: the set.

    Raises:
        UserError: none of the files of the set's folder is there.
    """
    import pyarrow as pa

    check_folder(described)
    base = described.folder()
    images = [_below(base, path) for path in listed["path"].to_pylist()]
    masks = [[_below(base, mask["path"]) for mask in row] for row in listed["masks"].to_pylist()]
    here = [path for path in images if path]
    if not here:
        return listed
    found = _listing(base, [*here, *(path for row in masks for path in row if path)])
    missing = [path for path in here if path not in found]
    if len(missing) == len(here):
        raise UserError(f"{described.table}: none of its {len(here)} images is in {base!r}, {here[0]!r} for one; check "
                        "the paths, the key images, or the mount")
    if missing:
        say(f"{described.table}: {len(missing)} of {len(here)} images are not in {base}, {missing[0]!r} for one; they "
            "go to quarantine")
    size = [found[path] + sum(found.get(mask or "", 0) for mask in row) if path in found else None
            for path, row in zip(images, masks, strict=True)]
    return listed.set_column(listed.schema.get_field_index("bytes"), "bytes", pa.array(size, pa.int64()))


def _below(base: str, path: str) -> str | None:
    """The path relative to `base`; None where it lies elsewhere."""
    if "://" in path or path.startswith("/"):
        return path.removeprefix(f"{base}/") if path.startswith(f"{base}/") else None
    return posixpath.normpath(path)


def _listing(base: str, paths: Iterable[str]) -> dict[str, int]:
    """Bytes of the files in the lowest folder that has all of `paths`, by path relative to `base`."""
    shared = posixpath.commonpath({posixpath.dirname(path) for path in paths})
    folder = posixpath.join(base, shared).rstrip("/")
    found = listing(folder) if holds_something(connect(folder)) else {}
    return {posixpath.join(shared, path): size for path, size in found.items()}
