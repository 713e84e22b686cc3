"""Tables that the workers of one node hold in memory once."""

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

from cluster.storage import Folder
from pipelines.data.tables import read_tensors


def read_once(folder: Folder, names: Sequence[str], others: Sequence[str], split: str) \
        -> tuple[dict[str, np.ndarray], pa.Table]:
    """As `read_tensors`; of several workers the first of each node reads the arrays, and all of them map its file.

    A collective.  The file has lost its name when this returns: it takes room in the node's temporary folder and in its
    page cache until the last worker ends, however it ends.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return read_tensors(folder, names, others, split)
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    aside, first = Path(tempfile.gettempdir()) / f"rayograph-{token[0]}", os.environ["LOCAL_RANK"] == "0"

    def mapped(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return open_memmap(aside / name, "w+", dtype, shape)

    if first:
        aside.mkdir()
    arrays, table = read_tensors(folder, names if first else [], others, split, mapped)
    dist.barrier()
    if not first:
        arrays = {name: np.load(aside / name, mmap_mode="r") for name in names}
    dist.barrier()
    if first:
        shutil.rmtree(aside)
    return arrays, table
