"""Random access to single images of a latents table, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Folder
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.tables.parquet import files, read_file, tensors

CACHE_BYTES = 1 << 30  # of row groups in memory


class TrainRows:
    """The tensors of single images of the train split.  Thread-safe.

    Args:
        latents: the table.
        names: the columns to read.
        cache_bytes: size of the cache of row groups, which holds at least two.
    """

    def __init__(self, latents: Folder, names: Sequence[str], cache_bytes: int = CACHE_BYTES) -> None:
        spec = read_latent_spec(latents)
        self.latents, self.names, self.files = latents, list(names), files(latents, "train")
        self.starts = np.cumsum([0, *spec.rows])
        fullest = int(np.argmax(spec.rows)) if spec.rows else 0
        metadata = read_file(latents, self.files[fullest], pq.read_metadata)
        self.group_rows = max(metadata.row_group(0).num_rows, 1)
        row_bytes = 2 * sum(int(np.prod(spec.shapes[name])) for name in self.names)
        self._group = lru_cache(max(2, cache_bytes // max(1, row_bytes * self.group_rows)))(self._read_group)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """float16 arrays of image `index` of the split, in the order of the table."""
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        group, row = divmod(index - int(self.starts[file]), self.group_rows)
        return {name: values[row] for name, values in self._group(file, group).items()}

    def _read_group(self, file: int, group: int) -> dict[str, np.ndarray]:
        def read(opened: pa.NativeFile) -> pa.Table:
            return pq.ParquetFile(opened, pre_buffer=True).read_row_group(group, self.names)

        table = read_file(self.latents, self.files[file], read)
        return {name: tensors(table, name) for name in self.names}
