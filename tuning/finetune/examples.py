"""Training and evaluation examples of the classifiers: images whose state of the target is known.

Tables are read shard by shard; a window of training images, or a sample of embeddings, is in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.session import device
from cluster.storage import Folder
from pipelines.data.labels import ABSENT, PRESENT, STATE_COLUMNS, UNKNOWN, label_states
from pipelines.generator.encoder.vit import embed, load_encoder
from pipelines.learning.readers import ArrayReader, ImageReader, Part, Reader
from pipelines.tables.draw import iterate_drawn, shares
from pipelines.tables.images import decode_images
from pipelines.tables.parquet import READERS, files, read_ahead, read_split

Examples = Iterable[tuple[np.ndarray, np.ndarray]]
"""Chunks of uint8 images (n, 1, H, W) or float32 embeddings (n, D), each with its targets, bool (n,)."""


def label_tables(part: Part) -> Iterator[pa.Table]:
    """The columns STATES of a part, one shard at a time."""
    folder, split = part
    return read_ahead(lambda name: read_split(folder, name, STATE_COLUMNS, split), files(folder, split), READERS)


def count_findings(tables: Iterable[pa.Table]) -> tuple[Counter[str], Counter[str]]:
    """Number of images in which each finding is present, and absent."""
    counters: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    for table in tables:
        for counter, name in zip(counters, STATE_COLUMNS, strict=True):
            counts = pc.value_counts(pc.list_flatten(table[name])).to_pylist()
            counter.update({row["values"]: row["counts"] for row in counts})
    return counters


def target_states(part: Part, target: str) -> np.ndarray:
    """State of the target in every image of a part, int8 (N,): 1, 0, or -1 (unknown)."""
    states = [label_states(table, [target])[:, 0] for table in label_tables(part)]
    return np.concatenate(states) if states else np.zeros(0, np.int8)


def count(states: np.ndarray) -> dict[str, int]:
    """Number of images in total and by the state of the target."""
    return {"images": len(states), **{name: int((states == state).sum()) for name, state in (
        ("positive", PRESENT), ("negative", ABSENT), ("unknown", UNKNOWN))}}


def image_reader(parts: list[Part], target: str, seed: int) -> Reader:
    """A reader of the images of all parts with a known state of the target."""
    states = np.concatenate([target_states(part, target) for part in parts])
    known = states != UNKNOWN
    return ImageReader(parts, seed, states[known] == PRESENT, known)


def embedding_reader(parts: list[Part], target: str, encoder: Folder, limit: int, batch: int, seed: int) -> ArrayReader:
    """The embeddings of all parts, in memory; of more than `limit`, a sample, proportional to the parts."""
    known = np.array([(target_states(part, target) != UNKNOWN).sum() for part in parts])
    quotas = known if known.sum() <= limit else shares(known, limit)
    drawn = [chunk for part, quota in zip(parts, quotas, strict=True)
             for chunk in draw_examples(part, target, encoder, int(quota), batch, seed)]
    return ArrayReader(np.concatenate([inputs for inputs, _ in drawn]), np.concatenate([known for _, known in drawn]),
                       seed)


def draw_examples(part: Part, target: str, encoder: Folder | None, limit: int, batch: int,
                  seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of a part with their targets; or their embeddings, if there is an encoder.

    Of more than `limit`, a random sample, stratified by source.
    """
    folder, split = part
    network = None if encoder is None else load_encoder(encoder).to(device())
    for shard in iterate_drawn(folder, limit, seed, ["image", *STATE_COLUMNS], split, by="source" if split else None,
                               used=target_states(part, target) != UNKNOWN):
        images = decode_images(shard)
        yield (images if network is None else embed(network, images, batch).numpy(),
               label_states(shard, [target])[:, 0] == PRESENT)
