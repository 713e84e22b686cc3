"""Latents of one split in a node's temporary folder: read once per node and memory-mapped by all its workers.

A restarted worker group on the node reuses them. They are deleted when training ends, or when another attempt at the
run needs other latents.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.lib.format import open_memmap

from cluster.storage import Folder
from pipelines.tables.parquet import read_tensors

OTHERS, DONE = "others.parquet", "done"


def read_cached(cache: Path, table: Folder, names: Sequence[str], others: Sequence[str], split: str) \
        -> tuple[dict[str, np.ndarray], pa.Table]:
    """As `read_tensors`, through `cache`, a folder of this node that its first worker fills.

    Raises:
        OSError: the disk has no space for the arrays.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):
        if not (cache / DONE).exists():
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir()
            try:
                arrays, rest = read_tensors(table, names, others, split,
                                            lambda name, shape, dtype: _mapped(_array(cache, name), shape, dtype))
                for name, array in arrays.items():
                    if not len(array):
                        np.save(_array(cache, name), array)
                pq.write_table(rest, cache / OTHERS)
            except BaseException:
                shutil.rmtree(cache, ignore_errors=True)
                raise
            (cache / DONE).touch()
    return {name: np.load(_array(cache, name), mmap_mode="r" if cached_rows(cache) else None) for name in names}, \
        pq.read_table(cache / OTHERS)


def cached_rows(cache: Path) -> int:
    return pq.read_metadata(cache / OTHERS).num_rows


def _array(cache: Path, name: str) -> Path:
    return cache / f"{name}.npy"


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array in a preallocated file: otherwise a full disk would kill the process with SIGBUS."""
    if not shape[0]:
        return np.empty(shape, dtype)
    array = open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        size = os.path.getsize(path)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, f"no space for {size / 2**30:.1f} GiB of latents ({error.strerror}); set "
                                       "TMPDIR to a larger folder", str(path.parent)) from error
    return array
