"""Where on the embedding manifold to sample: a strategy makes the condition of one image from real train images.

A strategy is a function `(pool, rng) -> Condition`. Labels come from the source images, which is what lets a classifier
learn from the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.data.tables import multi_hot, tensors


@dataclass(frozen=True)
class Condition:
    embedding: np.ndarray  # float32 (D,)
    labels: np.ndarray  # float32 (L,), multi-hot
    sources: tuple[str, ...]  # image_id of the real images it was made from


class Pool:
    """Embeddings and labels of the train split."""

    def __init__(self, table: pa.Table, labels: Sequence[str]) -> None:
        """`table` holds image_id, embedding and labels; `labels` is the order of the multi-hot columns."""
        self.image_ids = table["image_id"].to_pylist()
        self.embeddings = tensors(table, "embedding").astype(np.float32)
        self.labels = multi_hot(table, labels)
        _, self.group = np.unique(self.labels, axis=0, return_inverse=True)  # images with the same labels

    def condition(self, row: int) -> Condition:
        return Condition(self.embeddings[row], self.labels[row], (self.image_ids[row],))


Strategy = Callable[[Pool, np.random.Generator], Condition]


def reconstruction(pool: Pool, rng: np.random.Generator) -> Condition:
    """The embedding of one real image (DiNO-Diffusion, Bayer et al. 2024, arXiv 2407.11594)."""
    return pool.condition(int(rng.integers(len(pool.image_ids))))


def interpolation(pool: Pool, rng: np.random.Generator) -> Condition:
    """A random place on the arc between the embeddings of two real images with the same labels (ibid.)."""
    first = int(rng.integers(len(pool.image_ids)))
    second = int(rng.choice(np.flatnonzero(pool.group == pool.group[first])))
    mixed = slerp(pool.embeddings[first], pool.embeddings[second], rng.uniform())
    return Condition(mixed, pool.labels[first], (pool.image_ids[first], pool.image_ids[second]))


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Spherical interpolation between vectors (D,) of about equal length; straight where they nearly coincide."""
    cosine = float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12), -1, 1))
    angle = np.arccos(cosine)
    if np.sin(angle) < 1e-4:
        return ((1 - t) * a + t * b).astype(np.float32)
    return ((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)).astype(np.float32)


STRATEGIES: dict[str, Strategy] = {"reconstruction": reconstruction, "interpolation": interpolation}


def find_strategy(name: str) -> Strategy:
    """Raises ValueError naming the strategies there are."""
    if name not in STRATEGIES:
        raise ValueError(f"sample.strategy={name!r} is not known; there are: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
