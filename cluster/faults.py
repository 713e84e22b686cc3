"""Faults of the storage, told apart from faults of a file.

A file that was listed and cannot be read says nothing against the file: the network, a mount, a token or a disk may be
gone. Reading is tried again with growing waits, and then the run stops; nothing is ever counted against an image whose
bytes were not read.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.errors import UserError
from cluster.storage import Folder

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further attempt: a minute in all


class StorageUnavailable(OSError):
    """A storage cannot be read or written from this node; other nodes may reach it."""


def retried(call: Callable[[], T], uri: str, waits: Sequence[float] | None = None) -> T:
    """The result of `call`, tried again after each OSError, with jitter between half of a wait and all of it.

    Args:
        call: reads or writes something, and can be repeated.
        uri: what it reads or writes, for the message.
        waits: seconds before each further attempt; None: WAITS.

    Raises:
        StorageUnavailable: the last attempt failed, too.
    """
    waits = WAITS if waits is None else waits
    for wait in waits:
        try:
            return call()
        except StorageUnavailable:
            raise
        except OSError:
            time.sleep(wait * random.uniform(0.5, 1.0))
    try:
        return call()
    except OSError as error:
        raise StorageUnavailable(f"{uri} cannot be reached from {socket.gethostname()} after {len(waits) + 1} attempts "
                                 f"({error}); see to the storage, then give the same command again") from error


def read_listed(folder: Folder, name: str, waits: Sequence[float] | None = None) -> bytes:
    """The bytes of a file that a listing of `folder` named.

    Raises:
        StorageUnavailable: the folder cannot be read from this node, or the file cannot.
        UserError: the folder is there and the file is gone from it: the listing is out of date.
    """
    try:
        return retried(lambda: folder.read(name), f"{folder.uri}/{name}", waits)
    except StorageUnavailable as error:
        if isinstance(error.__cause__, FileNotFoundError) and _is_there(folder):
            raise UserError(f"{folder.uri}/{name} was listed and is gone; put it back, or add changed=redo to list "
                            "the images anew") from error
        raise


def _is_there(folder: Folder) -> bool:
    """Whether the folder holds anything, seen from this node: an empty one may be a mount that is missing."""
    try:
        return bool(folder.names())
    except OSError:
        return False
