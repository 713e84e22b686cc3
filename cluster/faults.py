"""Faults of the storage, as opposed to faults of a file.

An OSError on a listed file is attributed to the storage (network, mount, credentials, disk) and not to the file: the
call is retried with exponential back-off, then the run stops. Only a file whose bytes were read can be bad.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.errors import UserError
from cluster.storage import Folder

T = TypeVar("T")

BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further attempt: a minute in all


class StorageUnavailable(OSError):
    """A storage cannot be read or written from this node; other nodes may reach it."""


def with_retries(call: Callable[[], T], uri: str, waits: Sequence[float] | None = None) -> T:
    """The result of `call`, retried after each OSError with back-off and jitter (half of a wait to all of it).

    Slow failures such as network timeouts count: once the sum of the waits has elapsed, the next failure is the last.

    Args:
        call: reads or writes bytes and can be repeated; it must not decode them, since PIL raises OSErrors.
        uri: what it reads or writes, for the message.
        waits: seconds before each further attempt; None: BACKOFF_SECONDS.

    Raises:
        StorageUnavailable: the last attempt failed, too.
    """
    waits = BACKOFF_SECONDS if waits is None else waits
    deadline = time.monotonic() + sum(waits)
    for attempt, wait in enumerate((*waits, None), 1):
        try:
            return call()
        except StorageUnavailable:
            raise
        except OSError as error:
            if wait is None or time.monotonic() > deadline:
                raise StorageUnavailable(
                    f"{uri} cannot be reached from {socket.gethostname()} after {attempt} attempts ({error}); check "
                    "the mount, the network and the credentials there, then give the same command again") from error
            time.sleep(wait * random.uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def read_listed(folder: Folder, name: str, waits: Sequence[float] | None = None) -> bytes:
    """The bytes of a file that a listing of `folder` named.

    Raises:
        StorageUnavailable: the file cannot be read from this node.
        UserError: the file no longer exists although its folder holds others: the listing is out of date.
    """
    uri = f"{folder.uri}/{name}"
    try:
        return with_retries(lambda: folder.read(name), uri, waits)
    except StorageUnavailable as error:
        if isinstance(error.__cause__, FileNotFoundError) and holds_something(Folder(uri.rpartition("/")[0])):
            raise UserError(f"{uri} was listed but no longer exists; restore it, or add changed=redo to list "
                            "the images again") from error
        raise


def holds_something(folder: Folder) -> bool:
    """Whether a folder has entries, seen from this node; an empty one may be a mount point without its mount."""
    from pyarrow.fs import FileType

    try:
        if folder.is_local:
            with os.scandir(folder.uri) as entries:
                return any(True for _ in entries)
        return folder.filesystem.get_file_info(folder.path).type == FileType.Directory
    except OSError:
        return False
