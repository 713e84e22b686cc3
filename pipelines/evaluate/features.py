"""Feature vectors of tables of images: stored in shards, iterated in blocks, and sampled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.errors import UserError
from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.encoder.vit import embed
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.tables.draw import draw_rows
from pipelines.tables.images import decode_images
from pipelines.tables.parquet import AHEAD, iterate_shards, read_ahead, read_columns, read_shard, tensors, write_file

BATCH = 64  # images embedded per forward pass
BLOCK = 16_384  # embeddings on the device at a time


@dataclass
class Features:
    """Embeddings (N, D), float32 on the device, and the image_id of each row."""

    ids: list[str]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.ids)


class EmbeddingTable:
    """A table with the columns image_id and embedding (fixed-shape tensor); only image_id is in memory.

    Args:
        split: use only its rows; None: all.
    """

    def __init__(self, table: Folder, split: str | None = None) -> None:
        self.table, self.split = table, split
        self.ids: list[str] = read_columns(table, ["image_id"], split)["image_id"].to_pylist()

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, rows: int = BLOCK) -> Iterator[Tensor]:
        """All embeddings in order, in blocks of at least `rows` rows, float32 on the device."""
        shards = (tensors(shard, "embedding") for shard in iterate_shards(self.table, ["embedding"], self.split)
                  if shard.num_rows)
        return (torch.from_numpy(block).to(device()).float() for block in regrouped(shards, rows))

    def draw(self, n: int, seed: int, by: str | None = "source") -> Features:
        """A random sample of `n` rows (or all) in random order, stratified by the column `by` unless it is None."""
        table = draw_rows(self.table, n, seed, ["image_id", "embedding"], self.split, by)
        table = table.take(np.random.default_rng(seed).permutation(table.num_rows))
        embeddings = torch.from_numpy(tensors(table, "embedding")).to(device()).float()
        return Features(table["image_id"].to_pylist(), embeddings)


def regrouped(chunks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in the same order, in chunks of at least `rows` rows, except the last."""
    pending: list[np.ndarray] = []
    for chunk in chunks:
        pending.append(chunk)
        if sum(map(len, pending)) >= rows:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def extract(model: Encoder, images: Folder, out: Folder) -> EmbeddingTable:
    """Embed a table of images into `out`, shard by shard; existing shards are reused.

    Raises UserError if there is no image.
    """
    def read(name: str) -> tuple[pa.ChunkedArray, np.ndarray]:
        shard = read_shard(images, name, ["image_id", "image"])
        return shard["image_id"], decode_images(shard)

    done = set(out.names(".parquet"))
    names = [name for name in images.names(".parquet") if name not in done]
    for name, (ids, decoded) in zip(names, read_ahead(read, names, AHEAD), strict=True):
        if len(ids):
            embeddings = pa.FixedShapeTensorArray.from_numpy_ndarray(embed(model, decoded, BATCH).numpy())
            write_file(out, name, pa.table({"image_id": ids, "embedding": embeddings}))
    embedded = EmbeddingTable(out)
    if not len(embedded):
        raise UserError(f"{images.uri} holds no image to evaluate")
    return embedded
