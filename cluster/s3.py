"""S3 as a pyarrow file system; the one module that knows boto3.

pyarrow's own S3 knows neither conditional writes nor requester-pays. Endpoint, region, profile and credentials are
found the AWS way (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, AWS_ACCESS_KEY_ID, roles of a machine or a pod, …), and
with AWS_REQUEST_PAYER=requester the reader pays.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

ATTEMPTS = 8  # with exponential back-off and jitter, a minute in all
READ_AHEAD = 1 << 20  # bytes asked for at a time
IN_MEMORY = 64 << 20  # bytes of an upload; more of them wait on disk
DELETED_AT_ONCE = 1_000  # S3's limit
KINDS = {403: PermissionError, 404: FileNotFoundError, 409: BlockingIOError, 412: FileExistsError}  # by HTTP status
NOT_IMPLEMENTED = 501
without_conditions: set[str] = set()  # buckets whose store does not know conditional writes


def filesystem() -> PyFileSystem:
    return PyFileSystem(S3())


@lru_cache
def client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.Session().client("s3", config=Config(retries={"mode": "standard", "total_max_attempts": ATTEMPTS}))


def put(path: str, data: bytes, replace: bool) -> None:
    """Write one object in one step.

    Args:
        path: BUCKET/KEY.
        data: All of it.
        replace: False writes only where there is no such object yet (a conditional write).
    """
    place = _place(path)
    for attempt in range(ATTEMPTS):
        conditional = not replace and place["Bucket"] not in without_conditions
        if not replace and not conditional and _exists(path):
            return
        try:
            _call("put_object", path, **place, Body=data, **({"IfNoneMatch": "*"} if conditional else {}))
            return
        except FileExistsError:
            return
        except BlockingIOError:  # another writer is at it
            _back_off(attempt)
        except NotConditional:  # what is written with `replace=False` is the same whoever writes it
            without_conditions.add(place["Bucket"])
    raise OSError(f"s3://{path}: other writers are at it all the time")


class NotConditional(OSError):
    """The store answers 501 to a conditional write."""


def _exists(path: str) -> bool:
    try:
        _call("head_object", path, **_place(path))
    except FileNotFoundError:
        return False
    return True


class S3(FileSystemHandler):
    """Paths are BUCKET/KEY; a folder is what keys begin with, and needs no making."""

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
        place = _place(path)
        if place["Key"]:
            try:
                head = _call("head_object", path, **place)
                return FileInfo(path, FileType.File, size=head["ContentLength"], mtime=head["LastModified"])
            except FileNotFoundError:
                pass
        inside = _call("list_objects_v2", path, Bucket=place["Bucket"], Prefix=_prefix(place["Key"]), MaxKeys=1)
        return FileInfo(path, FileType.Directory if inside["KeyCount"] else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = selector.base_dir.rstrip("/")
        found = list(_listed(base, selector.recursive))
        if selector.recursive:  # as pyarrow wants it: the folders between, too
            above = {folder for info in found for folder in _above(info.path, base)}
            found += [FileInfo(folder, FileType.Directory) for folder in sorted(above)]
        if not found and not selector.allow_not_found and self._info(base).type == FileType.NotFound:
            raise FileNotFoundError(f"s3://{base} is not there")
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing to do."""

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = True) -> None:
        bucket = _place(path)["Bucket"]
        keys = [{"Key": _place(info.path)["Key"]} for info in _listed(path.rstrip("/"), True)]
        for start in range(0, len(keys), DELETED_AT_ONCE):
            answer = _call("delete_objects", path, Bucket=bucket,
                           Delete={"Objects": keys[start : start + DELETED_AT_ONCE], "Quiet": True})
            if errors := answer.get("Errors"):
                raise OSError(f"s3://{bucket}/{errors[0]['Key']} cannot be removed: {errors[0]['Message']}")

    def delete_root_dir_contents(self) -> None:
        raise OSError("a path without a bucket is not emptied")

    def delete_file(self, path: str) -> None:
        _call("delete_object", path, **_place(path))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        _call("copy_object", dest, **_place(dest), CopySource=_place(src))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(io.BufferedReader(_Ranges(path), READ_AHEAD), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Upload(path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError(f"s3://{path}: objects of S3 cannot be appended to")


class _Ranges(io.RawIOBase):
    """An object read by byte ranges, all of one version."""

    def __init__(self, path: str) -> None:
        self.path, self.place = path, _place(path)
        head = _call("head_object", path, **self.place)
        self.size, self.etag, self.at = head["ContentLength"], head["ETag"], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.at + len(buffer), self.size)
        if stop <= self.at:
            return 0
        data = self._part(self.at, stop)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _part(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), asked for again where the connection breaks in the middle of them."""
        from botocore.exceptions import BotoCoreError

        for attempt in range(ATTEMPTS):
            answer = _call("get_object", self.path, **self.place, Range=f"bytes={start}-{stop - 1}", IfMatch=self.etag)
            try:
                return answer["Body"].read()
            except BotoCoreError as error:
                last = error
                _back_off(attempt)
        raise OSError(f"s3://{self.path}: {last}") from last


class _Upload(io.RawIOBase):
    """An object that is there when it is closed, in parts where it is large."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        if not self.closed:
            self.file.seek(0)
            place = _place(self.path)
            try:
                with _oserrors(self.path):
                    client().upload_fileobj(self.file, place["Bucket"], place["Key"], ExtraArgs=_payer())
            finally:
                self.file.close()
                super().close()


def _listed(path: str, recursive: bool) -> Iterator[FileInfo]:
    """All that lies below a path, however many pages S3 tells it on."""
    place = _place(path)
    prefix = _prefix(place["Key"])
    pages = client().get_paginator("list_objects_v2").paginate(
        Bucket=place["Bucket"], Prefix=prefix, **({} if recursive else {"Delimiter": "/"}), **_payer())
    with contextlib.suppress(FileNotFoundError), _oserrors(path):
        for page in pages:
            for folder in page.get("CommonPrefixes", ()):
                yield FileInfo(f"{place['Bucket']}/{folder['Prefix'].rstrip('/')}", FileType.Directory)
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # the console's mark of an empty folder
                    yield FileInfo(f"{place['Bucket']}/{found['Key']}", FileType.File, size=found["Size"],
                                   mtime=found["LastModified"])


def _above(path: str, base: str) -> Iterator[str]:
    """The folders of a path below a base."""
    while (path := path.rpartition("/")[0]) != base and path:
        yield path


def _place(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


def _prefix(key: str) -> str:
    return f"{key.rstrip('/')}/" if key else ""


def _payer() -> dict[str, str]:
    payer = os.environ.get("AWS_REQUEST_PAYER")
    return {"RequestPayer": payer} if payer else {}


def _call(operation: str, path: str, **arguments: Any) -> Any:
    with _oserrors(path):
        return getattr(client(), operation)(**arguments, **_payer())


@contextlib.contextmanager
def _oserrors(path: str) -> Iterator[None]:
    """What boto3 raises within, as the OSError of its kind."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        kind = NotConditional if status == NOT_IMPLEMENTED else KINDS.get(status, OSError)
        raise kind(f"s3://{path}: {error}") from error
    except (Boto3Error, BotoCoreError) as error:  # no network, no credentials
        raise OSError(f"s3://{path}: {error}") from error


def _back_off(attempt: int) -> None:
    time.sleep(random.uniform(0, 0.1 * 2**attempt))
