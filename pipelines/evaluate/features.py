"""Feature vectors of whole tables of images, and draws of equal size from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError
from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.encoder.vit import embed
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.tables.images import pixels
from pipelines.tables.parquet import read_shard, read_table, tensors

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


def cached(latents: Folder, split: str) -> Features:
    """The embeddings that the stage `latents` keeps of the real images of a split."""
    table = read_table(latents, ["image_id", "embedding"], split)
    embeddings = torch.from_numpy(tensors(table, "embedding")).to(device()).float()
    return Features(table["image_id"].to_pylist(), embeddings)


def extract(model: Encoder, table: Folder) -> Features:
    """Embed the images of a table, one shard in memory at a time.  Raises UserError when there is none."""
    ids: list[str] = []
    parts: list[Tensor] = []
    for name in table.names(".parquet"):
        shard = read_shard(table, name, ["image_id", "image"])
        if shard.num_rows:
            ids += shard["image_id"].to_pylist()
            parts.append(embed(model, pixels(shard), BATCH).to(device()))
    if not parts:
        raise UserError(f"{table.uri} holds no image to evaluate")
    return Features(ids, torch.cat(parts))
