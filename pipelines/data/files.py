"""The files below a source's root: listed, drawn from, and read through one connection."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.faults import holds_something, read_listed
from cluster.storage import Folder
from pipelines.data.image.picture import NOT_WANTED, Refused
from pipelines.data.settings import DataSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
BATCH = 10_000  # rows of a manifest
DECODING = threading.Semaphore(2)  # at once in a process, while others read: a large film takes some 300 MB


@lru_cache(maxsize=256)
def connect(uri: str) -> Folder:
    """One connection for all images of a folder."""
    return Folder(uri)


def listing(root: str) -> dict[str, int]:
    """Bytes of every file that is not hidden, by path relative to the root, in order of path.

    Raises:
        UserError: the root is not there, or not readable.
    """
    from pyarrow.fs import FileSelector, FileType

    folder = connect(root)
    try:
        found = folder.filesystem.get_file_info(FileSelector(folder.path, recursive=True))
        files = [(f.path[len(folder.path) :].strip("/"), f.size) for f in found if f.type == FileType.File]
    except OSError as error:
        raise UserError(f"data.root={root!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.root={root!r} holds a file whose name is not UTF-8: {error.object!r}") from error
    return dict(sorted((path, size) for path, size in files if not any(p.startswith(".") for p in path.split("/"))))


def manifest_table(rows: Iterator[Mapping[str, Any]]) -> pa.Table:
    """Rows of the manifest as a table, few of them held as Python objects at a time."""
    import pyarrow as pa

    from pipelines.tables.schemas import MANIFEST

    parts = [MANIFEST.empty_table()]
    while part := list(itertools.islice(rows, BATCH)):
        parts.append(pa.Table.from_pylist(part, schema=MANIFEST))
    return pa.concat_tables(parts)


def draw_by_path_hash(listed: pa.Table, n: int | None) -> pa.Table:
    """`n` of the listed images (all for None), in order: from all folders alike, whatever other images there are."""
    if n is None or n >= listed.num_rows:
        return listed
    paths = listed["path"].to_pylist()
    drawn = sorted(range(len(paths)), key=lambda k: hashlib.sha256(paths[k].encode()).digest())
    return listed.take(sorted(drawn[:n]))


def read_image(folder: str, name: str, row: Mapping[str, Any], settings: DataSettings, listed: bool = True,
               **options: Any) -> Decoded:
    """Read and decode one file, and its masks if it has any.

    Args:
        folder: URI that `name` and the masks' paths are relative to, where they are neither absolute nor URIs.
        name: Path of the image.
        row: Of the manifest.
        settings: What to make of it.
        listed: Whether a listing named the file; else one that is not there is refused, unless the folder is missing or
            empty, too.
        options: Further ones of `decode`.

    Raises:
        Refused: why it cannot be used.
        StorageUnavailable: it cannot be read from this node, which says nothing against it.
        UserError: it is gone since it was listed.
    """
    from pipelines.data.image.decode import decode
    from pipelines.data.image.masks import label_map

    if reason := row.get("refused"):
        raise Refused(reason, f"its header says so: {NOT_WANTED[reason]}")
    content = _read(folder, name, listed)
    with DECODING:
        decoded = decode(content, settings, view=row.get("view"), **options)
    if not row.get("masks"):
        return decoded
    return replace(decoded, mask=label_map(row["masks"], decoded, lambda path: _read(folder, path, False)),
                   structures=tuple(dict.fromkeys(mask["name"] for mask in row["masks"])))


def _read(folder: str, path: str, listed: bool) -> bytes:
    if path.startswith(f"{folder}/"):
        path = path.removeprefix(f"{folder}/")
    elif "://" in path or path.startswith("/"):
        folder, _, path = path.rpartition("/")
    if listed:
        return read_listed(connect(folder), path)
    try:
        return connect(folder).read(path)
    except FileNotFoundError as error:
        if holds_something(connect(folder)):  # the folder of a mount that is missing is empty
            raise Refused("unreadable", "it is not there") from error
        return read_listed(connect(folder), path)
    except OSError:
        return read_listed(connect(folder), path)
