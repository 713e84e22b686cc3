"""A run's folders in the temporary folder of a node."""

from __future__ import annotations

import hashlib
import shutil
import socket
import tempfile
from pathlib import Path

from cluster.storage import Folder


def staging_dir(run: Folder) -> str:
    """A new folder on this node for files to be committed."""
    return tempfile.mkdtemp(prefix=_prefix(run))


def cache_dir(run: Folder, key: str) -> Path:
    """The folder on this node that keeps files between attempts of a run; one per key."""
    return Path(tempfile.gettempdir()) / f"{_prefix(run)}cache-{key}"


def sweep(run: Folder, keep: Path | None = None) -> None:
    """Remove leftovers of earlier attempts of this run from this node, except the cache `keep` and its lock."""
    for left in Path(tempfile.gettempdir()).glob(f"{_prefix(run)}*"):
        if keep is not None and left.name in (keep.name, f"{keep.name}.lock"):
            continue
        remove(left)


def remove(path: Path) -> None:
    """Remove a folder or a file of this node if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _prefix(run: Folder) -> str:
    """Prefix of the names of a run's folders on this node: the temporary folder may lie on a disk of several nodes."""
    key = f"{socket.gethostname()} {run.uri}"
    return f"rayograph-{hashlib.sha256(key.encode()).hexdigest()[:12]}-"
