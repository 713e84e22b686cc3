"""Where on the embedding manifold to sample: a strategy makes the condition of one image from real train images.

A strategy is a function `(pool, rng) -> Condition`. Labels come from the source images, what is absent or unknown as
well, which is what lets a classifier learn from the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data.labels import STATES, label_states
from pipelines.generator.latents.rows import TrainRows
from pipelines.generator.latents.spec import latent_spec
from pipelines.tables.parquet import read_columns


@dataclass(frozen=True)
class Condition:
    given: dict[str, np.ndarray]  # float32 of one image: embedding (D,), labels (L,) as 1, 0 or -1, patches, mask
    sources: tuple[str, ...]  # image_id of the real images it was made from


class Pool:
    """What is known of the images of the train split of a latents table: labels held, tensors read when drawn."""

    def __init__(self, latents: Folder) -> None:
        spec = latent_spec(latents)
        table = read_columns(latents, ["image_id", *STATES], "train")
        self.image_ids, self.label_names = table["image_id"], spec.labels
        self.labels = label_states(table, self.label_names)
        _, self.group = np.unique(self.labels, axis=0, return_inverse=True)  # of equal labels
        self.rows = TrainRows(latents, list(spec.shapes))

    def __len__(self) -> int:
        return len(self.labels)

    def condition(self, row: int) -> Condition:
        given = self.rows.row(row) | {"labels": self.labels[row]}
        return Condition({name: values.astype(np.float32) for name, values in given.items()},
                         (self.image_ids[row].as_py(),))


Strategy = Callable[[Pool, np.random.Generator], Condition]


def reconstruction(pool: Pool, rng: np.random.Generator) -> Condition:
    """The embedding of one real image (DiNO-Diffusion, Bayer et al. 2024, arXiv 2407.11594)."""
    return pool.condition(int(rng.integers(len(pool))))


def interpolation(pool: Pool, rng: np.random.Generator) -> Condition:
    """A random place on the arc between the embeddings of two real images with the same labels (ibid.).

    Of patch features each pair is interpolated alike; a mask is the first image's.
    """
    first = int(rng.integers(len(pool)))
    second = int(rng.choice(np.flatnonzero(pool.group == pool.group[first])))
    one, other, share = pool.condition(first), pool.condition(second), rng.uniform()
    mixed = {name: slerp(one.given[name], other.given[name], share)
             for name in ("embedding", "patches") if name in one.given}
    return Condition(one.given | mixed, one.sources + other.sources)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Spherical interpolation between vectors (..., D) of about equal length; straight where they nearly coincide."""
    norms = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
    angle = np.arccos(np.clip((a * b).sum(-1, keepdims=True) / (norms + 1e-12), -1, 1))
    straight = np.sin(angle) < 1e-4
    sine = np.where(straight, 1, np.sin(angle))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    return (first * a + second * b).astype(np.float32)


STRATEGIES: dict[str, Strategy] = {"reconstruction": reconstruction, "interpolation": interpolation}


def find_strategy(name: str) -> Strategy:
    """Raises UserError naming the strategies there are."""
    if name not in STRATEGIES:
        raise UserError(f"sample.strategy={name!r} is not known; there are: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
