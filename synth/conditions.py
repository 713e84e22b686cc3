"""Sampling strategies: how the condition of a synthetic image is made from real train images.

A strategy is a function `(pool, rng) -> Condition`. Labels, including absent and unknown states, are copied from the
source images, so that a classifier can be trained on the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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


class Pool:
    """Conditions of the train split of a latents table: labels are in memory, tensors are read on demand."""

    def __init__(self, latents: Folder) -> None:
        spec = read_latent_spec(latents)
        table = read_columns(latents, ["image_id", *STATE_COLUMNS], "train")
        self.image_ids, self.label_names = table["image_id"], spec.labels
        self.labels = label_states(table, self.label_names)
        _, self.group = np.unique(self.labels, axis=0, return_inverse=True)  # images with equal labels share a group
        self.rows = TrainRows(latents, list(spec.shapes))

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


STRATEGIES: dict[str, Strategy] = {"reconstruction": reconstruction, "interpolation": interpolation}


def find_strategy(name: str) -> Strategy:
    """The strategy of this name.  Raises UserError, with the known names, if there is none."""
    if name not in STRATEGIES:
        raise UserError(f"sample.strategy={name!r}: must be one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
