"""S3 objects as Python files: read in one request, read by ranges, or uploaded on close."""

from __future__ import annotations

import io
import tempfile
from typing import Any

from cluster.s3_client import ATTEMPTS, back_off, call, client, location, oserrors, payer

IN_MEMORY = 64 << 20  # bytes of an upload kept in memory; more are spooled to disk


class Download(io.RawIOBase):
    """An object read from its start in one GET request; after a break the connection is resumed at its byte.

    Raises:
        OSError: of the kind that matches the HTTP status; also if the object was replaced in the meantime.
    """

    def __init__(self, path: str) -> None:
        self.path, self.at = path, 0
        answer = call("get_object", path, **location(path))
        self.body, self.etag = answer["Body"], answer["ETag"]

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        from botocore.exceptions import BotoCoreError

        for attempt in range(ATTEMPTS):
            try:
                data = self.body.read(len(buffer))
                buffer[: len(data)] = data
                self.at += len(data)
                return len(data)
            except BotoCoreError as error:
                last = error
                back_off(attempt)
                self.body.close()
                self.body = call("get_object", self.path, **location(self.path), Range=f"bytes={self.at}-",
                                 IfMatch=self.etag)["Body"]
        raise OSError(f"s3://{self.path}: {last}") from last

    def close(self) -> None:
        if not self.closed:
            if hasattr(self, "body"):  # a dropped file whose first request failed has none
                self.body.close()
            super().close()


class Ranges(io.RawIOBase):
    """An object read by byte ranges, all of one version."""

    def __init__(self, path: str) -> None:
        self.path, self.at = path, 0
        head = call("head_object", path, **location(path))
        self.size, self.etag = head["ContentLength"], head["ETag"]

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
        data = self._range(self.at, stop)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), requested again if the connection breaks."""
        from botocore.exceptions import BotoCoreError

        for attempt in range(ATTEMPTS):
            answer = call("get_object", self.path, **location(self.path), Range=f"bytes={start}-{stop - 1}",
                          IfMatch=self.etag)
            try:
                return answer["Body"].read()
            except BotoCoreError as error:
                last = error
                back_off(attempt)
        raise OSError(f"s3://{self.path}: {last}") from last


class Upload(io.RawIOBase):
    """An object that appears when it is closed, uploaded in parts where it is large.

    Nothing is uploaded when a write failed (a full disk) or when the file is dropped without `close`.
    """

    def __init__(self, path: str) -> None:
        self.path, self.complete = path, True
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError:
            self.complete = False
            raise

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        if self.closed:
            return
        bucket, key = location(self.path).values()
        try:
            if self.complete:
                self.file.seek(0)
                with oserrors(self.path):
                    client().upload_fileobj(self.file, bucket, key, ExtraArgs=payer())
        finally:
            self.file.close()
            super().close()

    def __del__(self) -> None:
        self.complete = False
        self.close()
