"""Labels of a table: their names, and which image has which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def known_labels(table: pa.Table) -> list[str]:
    """The distinct labels of a table, sorted."""
    return sorted(pc.unique(pc.list_flatten(table["labels"]).drop_null()).to_pylist())


def multi_hot(table: pa.Table, labels: Sequence[str]) -> np.ndarray:
    """The labels column as float32 (N, len(labels)); other labels than these are left out."""
    hot = np.zeros((table.num_rows, len(labels)), np.float32)
    column = table["labels"].combine_chunks()
    if len(column) and labels:
        index = pc.index_in(pc.list_flatten(column), pa.array(labels, pa.string()))
        known = np.asarray(index.is_valid())
        hot[np.asarray(pc.list_parent_indices(column))[known], np.asarray(index.drop_null())] = 1
    return hot
