"""Latents read once per node: its workers map one file."""


from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist
from numpy.lib.format import open_memmap

from cluster.scratch import prefix
from cluster.storage import Folder
from pipelines.tables.parquet import read_tensors


def read_once(run: Folder, table: Folder, names: Sequence[str], others: Sequence[str], split: str) \
        -> tuple[dict[str, np.ndarray], pa.Table]:
    """As `read_tensors`; of several workers of a run, one of each node reads the arrays, and all of them map its file.

    A collective.  The file has lost its name when this returns: it takes room in the node's temporary folder and in its
    page cache until the last worker ends, however it ends.

    Raises:
        OSError: there is no room for the arrays.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return read_tensors(table, names, others, split)
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    shared = Path(tempfile.gettempdir()) / f"{prefix(run)}{token[0]}"
    dist.barrier()  # every worker has swept by now
    try:
        shared.mkdir()
        first = True
    except FileExistsError:
        first = False
    try:
        arrays, told = read_tensors(table, names if first else [], others, split,
                                    lambda name, shape, dtype: _mapped(shared / name, shape, dtype))
        dist.barrier()
        if not first:
            arrays = {name: np.load(shared / name, mmap_mode="r") for name in names}
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(shared)
    return arrays, told


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array in a file whose room is reserved: a full disk would else end the process without a word."""
    array = open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        size = os.path.getsize(path)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, f"no room for {size / 2**30:.1f} GiB of latents ({error.strerror}); TMPDIR may "
                                       "name a larger folder", str(path.parent)) from error
    return array
