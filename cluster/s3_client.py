"""boto3's S3 client, its errors as OSErrors, and writes of one object.

Endpoint, region, profile and credentials are found the AWS way (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE,
AWS_ACCESS_KEY_ID, roles of a machine or a pod, …), and with AWS_REQUEST_PAYER=requester the reader pays.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

ATTEMPTS = 8  # with exponential back-off and jitter, a minute in all
CONNECT_SECONDS = 10  # before an attempt counts as failed
KINDS = {403: PermissionError, 404: FileNotFoundError, 409: BlockingIOError, 412: FileExistsError}  # by HTTP status
UNSUPPORTED_STATUS = (405, 501)
UNSUPPORTED_CODES = ("NotImplemented", "InvalidArgument", "InvalidRequest")  # where the status is 400

log = logging.getLogger(__name__)
unconditional: set[str] = set()  # buckets whose store refused a conditional write of this process


class Unsupported(OSError):
    """The store does not implement the request, or one of its headers."""


@lru_cache
def client() -> Any:
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    when_required = dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    return boto3.Session().client("s3", config=Config(  # stores beside AWS refuse checksums that nobody asked for
        retries=retries, connect_timeout=CONNECT_SECONDS, **when_required))


def put(path: str, data: bytes, replace: bool) -> None:
    """Write one object in one request.

    A store that refuses `If-None-Match` is asked once per process and bucket. From then on existence is checked before
    the write: two writers at the same moment can both write, so what they write must not differ.

    Args:
        path: BUCKET/KEY.
        data: all that the object holds.
        replace: False leaves an object that is there as it is (a conditional write).

    Raises:
        OSError: of the kind that the store's answer stands for.
    """
    bucket = location(path)["Bucket"]
    for attempt in range(ATTEMPTS):
        conditional = not replace and bucket not in unconditional
        if not replace and not conditional and _exists(path):
            return
        try:
            call("put_object", path, **location(path), Body=data, **({"IfNoneMatch": "*"} if conditional else {}))
            return
        except FileExistsError:
            return
        except BlockingIOError:  # a concurrent write to the same key
            back_off(attempt)
        except Unsupported as error:
            if not conditional:
                raise
            unconditional.add(bucket)
            log.warning("s3://%s knows no conditional writes (%s); existence is checked before each write instead",
                        bucket, error)
    raise OSError(f"s3://{path}: concurrent writes to this key refused {ATTEMPTS} attempts")


def put_chunks(path: str, chunks: Sequence[bytes | memoryview]) -> None:
    """Write one object of any size in a multipart upload, which shows nothing of it before its end.

    Raises:
        OSError: of the kind that the store's answer stands for.
    """
    with oserrors(path):
        client().upload_fileobj(io.BufferedReader(_Chunks(chunks), 2**20), **location(path), ExtraArgs=payer())


class _Chunks(io.RawIOBase):
    """A file of memory that lies in pieces."""

    def __init__(self, chunks: Sequence[bytes | memoryview]) -> None:
        self.chunks = [memoryview(chunk).cast("B") for chunk in chunks]
        self.place = 0  # in the first chunk

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.chunks and self.place == len(self.chunks[0]):
            self.chunks, self.place = self.chunks[1:], 0
        if not self.chunks:
            return 0
        part = self.chunks[0][self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


def _exists(path: str) -> bool:
    try:
        call("head_object", path, **location(path))
    except FileNotFoundError:
        return False
    return True


def location(path: str) -> dict[str, str]:
    """BUCKET/KEY as boto3's arguments."""
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


def payer() -> dict[str, str]:
    """The argument by which the reader pays, where the environment says so."""
    value = os.environ.get("AWS_REQUEST_PAYER")
    return {"RequestPayer": value} if value else {}


def call(operation: str, path: str, **arguments: Any) -> Any:
    """The answer to one request about `path`.  Raises the OSError that the store's answer stands for."""
    with oserrors(path):
        return getattr(client(), operation)(**arguments, **payer())


@contextlib.contextmanager
def oserrors(path: str) -> Iterator[None]:
    """Raise boto3's errors as OSErrors of the matching kind."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _kind(error.response)(f"s3://{path}: {error}") from error
    except (Boto3Error, BotoCoreError) as error:  # no network, no credentials
        raise OSError(f"s3://{path}: {error}") from error


def _kind(response: dict[str, Any]) -> type[OSError]:
    status = response["ResponseMetadata"]["HTTPStatusCode"]
    code = response.get("Error", {}).get("Code")
    if status in UNSUPPORTED_STATUS or (status == 400 and code in UNSUPPORTED_CODES):
        return Unsupported
    return KINDS.get(status, OSError)


def back_off(attempt: int) -> None:
    time.sleep(random.uniform(0, 0.1 * 2**attempt))
