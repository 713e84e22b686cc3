"""One URI, one file system: every stage reads and writes through `Folder`, on a laptop's disk as on S3, GCS or HDFS."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import uuid
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster import commit
from cluster.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyarrow.fs import FileSystem


SAME_SCHEMES = {"gcs": "gs", "abfss": "abfs"}


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute, so that it means the same in every process of a cluster."""
    if uri.startswith("file:/"):
        uri = "/" + uri.removeprefix("file:").lstrip("/")
    return uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def overlaps(one: str, other: str) -> bool:
    """Whether one of two folders lies in the other, or they are the same.

    Local ones are compared by inode, so symbolic links and bind mounts are seen through; remote ones by the components
    of their paths.
    """
    first, second = _line(one), _line(other)
    return first[0] in second or second[0] in first


def _line(uri: str) -> list[Any]:
    """Identities of a folder and of all folders above it."""
    uri = absolute(uri)
    if "://" not in uri:
        place = Path(os.path.realpath(uri))
        return [_identity(path) for path in (place, *place.parents)]
    url = urlsplit(uri)
    path = PurePosixPath(posixpath.normpath("/" + url.path.lstrip("/")))
    host = url.netloc if url.scheme.startswith("abfs") else url.netloc.rpartition("@")[2]  # not gs://anonymous@BUCKET
    return [(SAME_SCHEMES.get(url.scheme, url.scheme), host, *part.parts) for part in (path, *path.parents)]


def _identity(path: Path) -> Any:
    """Device and inode of a folder; its path while it is not there."""
    try:
        found = path.stat()
    except OSError:
        return path
    return found.st_dev, found.st_ino


class Folder:
    """A folder on any file system that pyarrow opens by URI.

    Writes are atomic: a reader sees the whole old file or the whole new one, whenever the writer is killed.
    """

    def __init__(self, uri: str) -> None:
        self.uri = absolute(uri)
        if self.uri.startswith("s3://") and "?" in self.uri:
            raise UserError(f"{uri!r}: S3 is configured by AWS_ENDPOINT_URL, AWS_REGION, … and not in the URI")

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __reduce__(self) -> tuple:
        return Folder, (self.uri,)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @cached_property
    def _resolved(self) -> tuple[FileSystem, str]:
        from pyarrow import fs

        if self.uri.startswith("s3://"):
            from cluster import s3

            return s3.filesystem(), self.uri.removeprefix("s3://")
        if self.is_local:
            return fs.LocalFileSystem(), self.uri
        try:
            return fs.FileSystem.from_uri(self.uri)
        except ValueError as error:  # pyarrow's ArrowInvalid
            raise UserError(f"{self.uri}: {error}") from error

    @property
    def filesystem(self) -> FileSystem:
        return self._resolved[0]

    @property
    def path(self) -> str:
        """The folder's path inside `filesystem` (no scheme)."""
        return self._resolved[1]

    def exists(self, name: str) -> bool:
        from pyarrow.fs import FileType

        return self.filesystem.get_file_info(f"{self.path}/{name}").type != FileType.NotFound

    def size(self, name: str) -> int | None:
        """Bytes of one file, or None if it does not exist."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").size

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the committed entries directly below this folder; empty if the folder does not exist."""
        from pyarrow.fs import FileSelector

        found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sorted(f.base_name for f in found if f.base_name.endswith(suffix) and not f.base_name.startswith("."))

    def is_empty(self) -> bool:
        """Whether the folder holds nothing, hidden or not, except temporary files of interrupted writes."""
        from pyarrow.fs import FileSelector

        found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return all(commit.is_staged(f.base_name) for f in found)

    def read(self, name: str) -> bytes:
        """All bytes of one file as they are stored, also where its name ends in .gz; one request on S3."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as stream:
            return stream.read()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object stored as `name`, or None if there is none."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise RuntimeError(f"{self.uri}/{name} is damaged ({error}); remove it to have its stage done again") \
                from error

    def write(self, name: str, data: bytes, replace: bool = True, private: bool = False) -> None:
        """Commit `data` as `name` in one atomic step.

        Args:
            name: of the file.
            data: its content.
            replace: False leaves an existing file as it is, so that a straggler cannot undo later work (atomic on a
                disk and on S3; elsewhere existence is checked before the rename).
            private: on a disk, only its owner may read the file.

        Raises:
            OSError: names the file; nothing of it is visible.
        """
        if self.is_local:
            commit.on_disk(self.uri, name, [data], replace, private)
        elif self.uri.startswith("s3://"):
            from cluster.s3_client import put

            put(f"{self.path}/{name}", data, replace)
        else:
            commit.by_rename(self.filesystem, self.path, name, [data], replace)

    def write_chunks(self, name: str, chunks: Sequence[commit.Chunk]) -> None:
        """Commit a large file in one atomic step, without a copy of it in memory; in several parts at once on S3.

        Raises:
            OSError: names the file; nothing of it is visible.
        """
        if self.is_local:
            commit.on_disk(self.uri, name, chunks, replace=True, private=False)
        elif self.uri.startswith("s3://"):
            from cluster.s3_client import put_chunks

            put_chunks(f"{self.path}/{name}", chunks)
        else:
            commit.by_rename(self.filesystem, self.path, name, chunks, replace=True)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write(name, json.dumps(value, indent=2, default=str).encode() + b"\n")

    def remove(self, name: str) -> None:
        """Remove one file if it exists."""
        if self.exists(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def clear(self, marker: str) -> None:
        """Remove everything in the folder except the file `marker`, which marks the folder as ours.

        Raises:
            UserError: there is no such file.
        """
        from pyarrow.fs import FileSelector, FileType

        if not self.exists(marker):
            raise UserError(f"{self.uri} is not cleared: without {marker} its files may belong to somebody else")
        for found in self.filesystem.get_file_info(FileSelector(self.path)):
            if found.type == FileType.Directory:
                self.filesystem.delete_dir(found.path)
            elif found.base_name != marker:
                self.filesystem.delete_file(found.path)

    def upload(self, local: str | os.PathLike[str]) -> None:
        """Copy a local folder's files below this one."""
        from pyarrow import fs

        self.filesystem.create_dir(self.path, recursive=True)
        fs.copy_files(os.fspath(local), self.path, source_filesystem=fs.LocalFileSystem(),
                      destination_filesystem=self.filesystem)

    def download(self, local: str | os.PathLike[str]) -> None:
        """Copy all files below this folder into a local one."""
        from pyarrow import fs

        os.makedirs(local, exist_ok=True)
        fs.copy_files(self.path, os.fspath(local), source_filesystem=self.filesystem,
                      destination_filesystem=fs.LocalFileSystem())
        for leftover in Path(local).rglob(".*.tmp"):  # of a write that was cut off
            leftover.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a local folder for this process, until it ends in whatever way; object stores have no such lock.

        Raises:
            UserError: another process of this machine holds it.
        """
        if not self.is_local:
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.uri}/.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.uri}: another rayograph command is at work there; wait for it, or choose another "
                             "name=") from error
        except OSError:
            pass  # this file system has no locks
        try:
            yield
        finally:
            lock.release()

    def check_writable(self) -> None:
        """Raise UserError naming the folder when it cannot be written to."""
        probe = f"probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"")
            self.remove(probe)
        except OSError as error:
            raise UserError(f"storage {self.uri!r} cannot be written to ({error}); choose another with storage=DIR") \
                from error
