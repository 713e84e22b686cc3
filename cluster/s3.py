"""S3 as a pyarrow file system: pyarrow's own S3 knows neither conditional writes nor requester-pays."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from cluster.s3_client import call, client, location, oserrors, payer
from cluster.s3_streams import Download, Ranges, Upload

READ_AHEAD = 1 << 20  # bytes of a range requested at a time
DELETED_AT_ONCE = 1_000  # S3's limit


def filesystem() -> PyFileSystem:
    return PyFileSystem(S3())


class S3(FileSystemHandler):
    """Paths are BUCKET/KEY; a folder is a common prefix of keys and need not be created."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3)

    def __hash__(self) -> int:
        return hash(S3)

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path.rstrip("/")) for path in paths]

    def _info(self, path: str) -> FileInfo:
        bucket, key = location(path).values()
        if key:
            try:
                head = call("head_object", path, Bucket=bucket, Key=key)
                return FileInfo(path, FileType.File, size=head["ContentLength"], mtime=head["LastModified"])
            except FileNotFoundError:
                pass
        inside = call("list_objects_v2", path, Bucket=bucket, Prefix=_prefix(key), MaxKeys=1)
        return FileInfo(path, FileType.Directory if inside["KeyCount"] else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = selector.base_dir.rstrip("/")
        found = list(_listed(base, selector.recursive))
        if selector.recursive:  # pyarrow expects the intermediate folders, too
            above = {folder for info in found for folder in _above(info.path, base)}
            found += [FileInfo(folder, FileType.Directory) for folder in sorted(above)]
        if not found and not selector.allow_not_found and self._info(base).type == FileType.NotFound:
            raise FileNotFoundError(f"s3://{base} does not exist")
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing to do."""

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = True) -> None:
        bucket = location(path)["Bucket"]
        keys = [{"Key": location(info.path)["Key"]} for info in _listed(path.rstrip("/"), True)]
        for start in range(0, len(keys), DELETED_AT_ONCE):
            answer = call("delete_objects", path, Bucket=bucket,
                           Delete={"Objects": keys[start : start + DELETED_AT_ONCE], "Quiet": True})
            if errors := answer.get("Errors"):
                raise OSError(f"s3://{bucket}/{errors[0]['Key']} cannot be removed: {errors[0]['Message']}")

    def delete_root_dir_contents(self) -> None:
        raise OSError("deleting all buckets is not supported")

    def delete_file(self, path: str) -> None:
        call("delete_object", path, **location(path))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        call("copy_object", dest, **location(dest), CopySource=location(src))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(io.BufferedReader(Download(path), READ_AHEAD), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(io.BufferedReader(Ranges(path), READ_AHEAD), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(Upload(path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError(f"s3://{path}: objects of S3 cannot be appended to")


def _listed(path: str, recursive: bool) -> Iterator[FileInfo]:
    """All objects and folders below a path, over all pages of the listing."""
    bucket, key = location(path).values()
    pages = client().get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=_prefix(key), **({} if recursive else {"Delimiter": "/"}), **payer())
    with contextlib.suppress(FileNotFoundError), oserrors(path):
        for page in pages:
            for folder in page.get("CommonPrefixes", ()):
                yield FileInfo(f"{bucket}/{folder['Prefix'].rstrip('/')}", FileType.Directory)
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # the console's marker of an empty folder
                    yield FileInfo(f"{bucket}/{found['Key']}", FileType.File, size=found["Size"],
                                   mtime=found["LastModified"])


def _above(path: str, base: str) -> Iterator[str]:
    """The folders of a path below a base."""
    while (path := path.rpartition("/")[0]) != base and path:
        yield path


def _prefix(key: str) -> str:
    return f"{key.rstrip('/')}/" if key else ""
