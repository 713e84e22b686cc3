"""The contents of a latents table, summarised once in spec.json so that later stages need not scan it.

Every file carries its sums in its footer, so that footers suffice to summarise the table, also after a resumed run.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data.labels import present_findings
from pipelines.graph.stage import Metrics
from pipelines.tables.parquet import read_file, split_name, tensors, write_file
from pipelines.tables.schemas import SPLITS

FILE = "spec.json"
SUMS = b"rayograph"  # the key of a file's metadata
READERS = 32  # footers read concurrently


@dataclass(frozen=True)
class LatentSpec:
    """Shapes of one image in a latents table, and numbers of images.

    Args:
        latent: channels, height, width.
        shapes: of each condition except labels.
        labels: findings present in the train split, sorted.
        structures: channels of the mask.
        logvar: whether log-variances are stored.
        images: number in each split.
        rows: images of the train split in each shard.
    """

    latent: tuple[int, int, int]
    shapes: dict[str, tuple[int, ...]]
    labels: list[str]
    structures: list[str]
    logvar: bool
    images: dict[str, int]
    rows: tuple[int, ...]


def read_latent_spec(folder: Folder) -> LatentSpec:
    """The spec written by the latents stage.  Raises UserError if it is missing."""
    spec = folder.read_json(FILE)
    if spec is None:
        raise UserError(f"{folder.uri} has no {FILE}: it is incomplete or was made by an earlier version; run "
                        "`rayograph latents changed=redo`")
    channels, height, width = spec["latent"]
    return LatentSpec((channels, height, width), {name: tuple(shape) for name, shape in spec["shapes"].items()},
                      spec["labels"], spec["structures"], spec["logvar"], spec["images"], tuple(spec["rows"]))


def write_latents(folder: Folder, index: int, table: pa.Table) -> None:
    """Commit the latents of one shard of images: a file per split, train last, as it marks the shard as done.

    Of two attempts at a shard, the first to finish counts.
    """
    for split in ("val", "test", "train"):
        rows = table.filter(pc.field("split") == split)
        if rows.num_rows or split == "train":
            write_file(folder, split_name(split, index), _with_sums(rows), replace=False)


def write_spec(folder: Folder) -> Metrics:
    """Write spec.json.  Returns the number and shape of the latents, mean and standard deviation of each channel."""
    spec, statistics = summarise(folder)
    folder.write_json(FILE, spec)
    return statistics


def _with_sums(table: pa.Table) -> pa.Table:
    """The table with per-channel sums of its latents and its labels in the schema metadata."""
    values = tensors(table, "latent_mean").astype(np.float64) if table.num_rows else np.zeros((0, 1, 1, 1))
    sums = {"sum": values.sum((0, 2, 3)).tolist(), "squares": np.square(values).sum((0, 2, 3)).tolist(),
            "labels": present_findings(table)}
    return table.replace_schema_metadata({SUMS: json.dumps(sums).encode()})


def summarise(folder: Folder) -> tuple[dict[str, Any], Metrics]:
    """The spec as JSON values; and the number and shape of the latents, mean and standard deviation of each channel."""
    names = folder.names(".parquet")
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(lambda name: _footer(folder, name), names))
    assert footers, f"{folder.uri} holds no latents"
    images: Counter[str] = Counter()
    labels: set[str] = set()
    total, squares = np.zeros(1), np.zeros(1)
    for name, (rows, sums, _) in zip(names, footers, strict=True):
        split = name.partition("-")[0]
        images[split] += rows
        labels |= set(sums["labels"]) if split == "train" else set()
        if rows:
            total, squares = total + np.array(sums["sum"]), squares + np.array(sums["squares"])
    shapes = {field.name: tuple(field.type.shape) for field in footers[0][2]
              if isinstance(field.type, pa.FixedShapeTensorType)}
    latent = shapes.pop("latent_mean")
    spec = {"latent": latent, "logvar": shapes.pop("latent_logvar", None) is not None, "shapes": shapes,
            "labels": sorted(labels), "structures": mask_structures(footers[0][2]),
            "images": {split: images[split] for split in SPLITS},
            "rows": [rows for name, (rows, *_) in zip(names, footers, strict=True) if name.startswith("train-")]}
    count = max(images.total(), 1) * int(np.prod(latent[1:]))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return spec, {"images": images.total(), "shape": list(latent), "channel_mean": mean.round(4).tolist(),
                  "channel_std": deviation.round(4).tolist(), "logvar": spec["logvar"]}


def mask_structures(schema: pa.Schema) -> list[str]:
    """Names of the mask channels; empty without a mask."""
    return json.loads(schema.field("mask").metadata[b"structures"]) if "mask" in schema.names else []


def _footer(folder: Folder, name: str) -> tuple[int, dict[str, Any], pa.Schema]:
    """Rows, sums and schema of one file."""
    metadata = read_file(folder, name, pq.read_metadata)
    schema = metadata.schema.to_arrow_schema()
    return metadata.num_rows, json.loads(schema.metadata[SUMS]), schema
