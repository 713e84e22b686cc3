"""Feature vectors of whole tables of images, and draws of equal size from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from pipelines.data.tables import pixels, read_shard
from pipelines.generator.components.encoder import Encoder
from pipelines.generator.encoder import embed

BATCH = 64


@dataclass
class Features:
    """Embeddings (N, D), float32 on the device, and the image_id of each row."""

    ids: list[str]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> Features:
        return Features([self.ids[row] for row in rows], self.embeddings[torch.from_numpy(rows).to(device())])

    def draw(self, n: int, random: np.random.Generator) -> Features:
        """`n` different rows in random order."""
        return self.take(random.permutation(len(self))[:n])


def extract(model: Encoder, table: Folder, split: str | None = None) -> Features:
    """Embed the images of a table (of one split where it is given), one shard in memory at a time.

    Raises:
        ValueError: There is no such image.
    """
    ids: list[str] = []
    parts: list[Tensor] = []
    for name in table.names(".parquet"):
        shard = read_shard(table, name, ["image_id", "image", *(["split"] if split else [])])
        if split:
            shard = shard.filter(pc.field("split") == split)
        if shard.num_rows:
            ids += shard["image_id"].to_pylist()
            parts.append(embed(model, pixels(shard), BATCH).to(device()))
    if not parts:
        raise ValueError(f"{table.uri} holds no image{f' of the {split} split' if split else ''} to evaluate")
    return Features(ids, torch.cat(parts))
