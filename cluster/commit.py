"""Atomic writes of one file: written under a hidden temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

Chunk = bytes | memoryview


def on_disk(folder: str, name: str, chunks: Sequence[Chunk], replace: bool, private: bool) -> None:
    """Write a file of a local folder atomically; the arguments are those of `Folder.write`, with the data in chunks.

    Raises:
        OSError: names the file and its size; the temporary file is removed.
    """
    os.makedirs(folder, exist_ok=True)
    staged, target = _staged(folder, name), f"{folder}/{name}"
    mode = 0o600 if private else 0o666  # minus the umask
    with _described(target, size(chunks)):
        try:
            with open(staged, "wb", opener=lambda path, flags: os.open(path, flags, mode)) as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            if replace or not _linked(staged, target):
                os.replace(staged, target)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(staged)
            raise


def by_rename(filesystem: FileSystem, folder: str, name: str, chunks: Sequence[Chunk], replace: bool) -> None:
    """Write a file on any file system of pyarrow, none of which publishes files atomically by itself.

    HDFS shows a file from its first byte. abfs:// creates the object empty when its stream is opened, and commits what
    was written so far when the stream is dropped after an error.

    Two limits remain. HDFS has no rename that replaces: pyarrow deletes the old file first, and a kill between the two
    leaves neither (`replace=False` does not get there). Where a file system has no rename, the file is copied under its
    name and then removed under the hidden one.

    Raises:
        OSError: names the file and its size.
    """
    staged, target = _staged(folder, name), f"{folder}/{name}"
    filesystem.create_dir(folder, recursive=True)
    with _described(target, size(chunks)):
        try:
            with filesystem.open_output_stream(staged, compression=None) as stream:
                for chunk in chunks:
                    stream.write(chunk)
            if not replace and filesystem.get_file_info(target).is_file:
                filesystem.delete_file(staged)
                return
            try:
                filesystem.move(staged, target)
            except NotImplementedError:
                filesystem.copy_file(staged, target)
                filesystem.delete_file(staged)
        except OSError:
            with contextlib.suppress(OSError):
                filesystem.delete_file(staged)
            raise


def size(chunks: Sequence[Chunk]) -> int:
    """Bytes of all chunks together."""
    return sum(memoryview(chunk).nbytes for chunk in chunks)


def is_staged(name: str) -> bool:
    """Whether a file's name is one that a write is staged under."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", name) is not None


def _staged(folder: str, name: str) -> str:
    return f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"


def _linked(staged: str, target: str) -> bool:
    """Whether `target` now exists, linked from `staged` or from before; False if the file system has no hard links."""
    try:
        os.link(staged, target)
    except FileExistsError:
        pass
    except OSError:
        return False
    os.unlink(staged)
    return True


@contextlib.contextmanager
def _described(target: str, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"{size:,} bytes cannot be written ({error.strerror or error})",
                      target) from error
