"""Folders of one run in a node's temporary folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from cluster.storage import Folder


def staging_dir(run: Folder) -> str:
    """A new folder on this node, for what the run is about to commit."""
    return tempfile.mkdtemp(prefix=prefix(run))


def sweep(run: Folder) -> None:
    """Remove what killed attempts at this run have left on this node."""
    for left in Path(tempfile.gettempdir()).glob(f"{prefix(run)}*"):
        shutil.rmtree(left, ignore_errors=True)


def prefix(run: Folder) -> str:
    """How the names of a run's folders begin."""
    return f"rayograph-{hashlib.sha256(run.uri.encode()).hexdigest()[:12]}-"
