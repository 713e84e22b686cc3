"""A latents table of random numbers, and the specification of a training run on it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cluster.storage import Folder
from pipelines.generator.latents.spec import write_latents, write_spec
from pipelines.generator.training.loop import TrainingSpec
from pipelines.graph.settings import Settings
from pipelines.tables.schemas import latents_schema

LABELS = ("a", "b")


def make_latents(folder: Folder, rows: int, shard: int, latent: tuple[int, int, int], width: int) -> None:
    """`rows` images of the train split, in shards of `shard`."""
    rng, schema = np.random.default_rng(0), latents_schema(latent, width)
    for index in range(rows // shard):
        shapes = {"latent_mean": latent, "latent_logvar": latent, "embedding": (width,)}
        values = {name: rng.standard_normal((shard, *shape)).astype(np.float16) for name, shape in shapes.items()}
        arrays = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(value) for name, value in values.items()}
        columns = {"image_id": [f"{index}-{k}" for k in range(shard)], "patient_id": ["p"] * shard,
                   "source": ["s"] * shard, "labels": [[LABELS[k % 2]] for k in range(shard)],
                   "absent": [[LABELS[1 - k % 2]] for k in range(shard)], "split": ["train"] * shard}
        write_latents(folder, index, pa.table({name: (arrays | columns)[name] for name in schema.names}, schema=schema))
    write_spec(folder)


def training_spec(root: Folder, settings: Settings, rows: int, latent: tuple[int, int, int],
                  width: int) -> TrainingSpec:
    """A training run on latents made below `root`."""
    make_latents(root / "latents", rows, rows // 4, latent, width)
    channels = latent[0]
    return TrainingSpec(settings, "bench", root / "train", root / "latents", None, [0.0] * channels, [1.0] * channels)
