"""Sampling strategies: how the condition of a synthetic image is made from real train images.

A strategy is a function `(pool, rng) -> Condition`. Labels, including absent and unknown states, are copied from the
source images, so that a classifier can be trained on the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data.labels import STATE_COLUMNS, label_states
from pipelines.generator.latents.rows import TrainRows
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.tables.parquet import read_columns


@dataclass(frozen=True)
class Condition:
    """The condition of one synthetic image."""

    values: dict[str, np.ndarray]  # float32, of one image: embedding (D,), labels (L,) as 1, 0 or -1, patches, mask
    sources: tuple[str, ...]  # image_id of the real images that it was made from


@dataclass(frozen=True)
class PoolIndex:
    """The train images of a latents table. Read once, then shared by all actors of a node in Ray's object store."""

    image_ids: pa.ChunkedArray
    label_names: list[str]
    labels: np.ndarray  # states, int8 (N, L)
    group: np.ndarray  # (N,): images with equal labels share a group


def read_pool_index(latents: Folder) -> PoolIndex:
    names = read_latent_spec(latents).labels
    table = read_columns(latents, ["image_id", *STATE_COLUMNS], "train")
    labels = label_states(table, names)
    _, group = np.unique(labels, axis=0, return_inverse=True)
    return PoolIndex(table["image_id"], names, labels, group)


class Pool:
    """Conditions of the train split of a latents table, whose tensors are read on demand."""

    def __init__(self, latents: Folder, index: PoolIndex) -> None:
        self.image_ids, self.labels, self.group = index.image_ids, index.labels, index.group
        self.rows = TrainRows(latents, list(read_latent_spec(latents).shapes))

    def __len__(self) -> int:
        return len(self.labels)

    def condition(self, row: int) -> Condition:
        """The condition of one image."""
        arrays = self.rows.row(row) | {"labels": self.labels[row]}
        return Condition({name: array.astype(np.float32) for name, array in arrays.items()},
                         (self.image_ids[row].as_py(),))


Strategy = Callable[[Pool, np.random.Generator], Condition]


def reconstruction(pool: Pool, rng: np.random.Generator) -> Condition:
    """The embedding of one real image (DiNO-Diffusion, Bayer et al. 2024, arXiv 2407.11594)."""
    return pool.condition(int(rng.integers(len(pool))))


def interpolation(pool: Pool, rng: np.random.Generator) -> Condition:
    """A random point on the arc between the embeddings of two real images with the same labels (ibid.).

    Patch features are interpolated pairwise in the same way; the mask is that of the first image.
    """
    first = int(rng.integers(len(pool)))
    second = int(rng.choice(np.flatnonzero(pool.group == pool.group[first])))
    a, b, t = pool.condition(first), pool.condition(second), rng.uniform()
    mixed = {name: slerp(a.values[name], b.values[name], t)
             for name in ("embedding", "patches") if name in a.values}
    return Condition(a.values | mixed, a.sources + b.sources)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Spherical interpolation between vectors (..., D) of similar length; linear if they nearly coincide."""
    norms = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
    angle = np.arccos(np.clip((a * b).sum(-1, keepdims=True) / (norms + 1e-12), -1, 1))
    linear = np.sin(angle) < 1e-4
    sine = np.where(linear, 1, np.sin(angle))
    first = np.where(linear, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(linear, t, np.sin(t * angle) / sine)
    return (first * a + second * b).astype(np.float32)


def unconditional(pool: Pool, rng: np.random.Generator) -> Condition:
    """No condition, of a generator that takes none: its images come from no image in particular, with no labels."""
    return Condition({}, ())


STRATEGIES: dict[str, Strategy] = {"reconstruction": reconstruction, "interpolation": interpolation}


def find_strategy(name: str) -> Strategy:
    """The strategy of this name.  Raises UserError, with the known names, if there is none."""
    if name not in STRATEGIES:
        raise UserError(f"sample.strategy={name!r}: must be one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
