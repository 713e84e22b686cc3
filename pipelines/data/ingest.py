"""Stage `ingest`: images of any source to clean, split, de-duplicated Parquet, one bad image costing one image.

The manifest is written once, in numbered shards, and Ray Data runs over their numbers (`convert`); then copies are
found and the shards that hold them rewritten (`deduplicate`). Killed anywhere, the same command comes to the same end.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data import identifiers, split
from pipelines.data.convert import Convert
from pipelines.data.deduplicate import deduplicate
from pipelines.data.image.picture import NOT_WANTED
from pipelines.data.labels import label_lines, label_report, present
from pipelines.data.manifest import look, write_manifest
from pipelines.data.settings import Data
from pipelines.data.sources import cards_of
from pipelines.graph.settings import Settings
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import bar, say
from pipelines.tables.parquet import iterate_shards, pending_shards, shard_count
from pipelines.tables.schemas import QUARANTINE
from pipelines.tables.shards import run_shards
from pipelines.tables.streaming import shard_numbers

ENOUGH = 1_000  # images seen, from which on too many bad ones stop the run before its end


def ingest(stage: Stage) -> Metrics:
    """Returns counts of images, refused images and patients, by split and finding, the label report, and images/s.

    Raises:
        StorageUnavailable: the storage fails on every node, or again and again for one image.
        UserError: too many images are bad, or none is usable.
    """
    data, folder = stage.section(Data), stage.folder
    images, quarantine = folder / "images", folder / "quarantine"
    rows = write_manifest(folder / "manifest", data, stage.seed, Folder(stage.settings.storage))
    pending = pending_shards(images, shard_count(rows, data.shard_rows))
    mixed = np.random.default_rng(0).permutation(pending).tolist()  # so that the first shards tell of all
    with bar("ingest", rows) as shown:
        shown.to(rows - sum(min(data.shard_rows, rows - index * data.shard_rows) for index in pending))
        speed = run_shards(Convert(folder, data), shard_numbers(mixed), shown, BadImages(rows, quarantine, data))
    deduplicate(folder, data)
    counts = summarise(images, quarantine)
    if counts["images"] + counts["quarantined"] != rows:
        raise RuntimeError(f"{folder.uri} holds {counts['images']} images and {counts['quarantined']} refused ones of "
                           f"{rows}; remove it to have it done again")
    check(counts, quarantine, data)
    for line in label_lines(counts["label_report"]):
        say(f"ingest: {line}")
    terms = {name: {"title": card.title, "licence": card.licence, "citation": card.citation, "sign": card.sign}
             for name, card in cards_of(data).items()}
    counts |= {"source": data.source, "size": data.size, "terms": terms}
    return counts | ({"images_per_second": speed} if speed else {})


def observed(settings: Settings) -> dict[str, Any]:
    """What beside the settings shapes the result: what the source lists, and which salt hashes identifiers."""
    return {"data.listed": look(settings.data, settings.seed), "data.salt": identifiers.which_salt()}


class BadImages:
    """Stops the run once enough images were seen and too many of them are bad."""

    def __init__(self, total: int, quarantine: Folder, settings: Data) -> None:
        self.enough, self.quarantine, self.limit = min(total, ENOUGH), quarantine, settings.max_bad_fraction
        self.seen = self.bad = 0

    def __call__(self, rows: int, bad: int) -> None:
        self.seen += rows
        self.bad += bad
        if self.seen >= self.enough and self.bad > self.limit * self.seen:
            raise too_many(self.bad, self.seen, self.limit, self.quarantine)


def too_many(bad: int, seen: int, limit: float, quarantine: Folder) -> UserError:
    return UserError(f"{bad} of {seen} images are bad, more than data.max_bad_fraction={limit}{_example(quarantine)}; "
                     f"all are listed in {quarantine.uri}")


def summarise(images: Folder, quarantine: Folder) -> Metrics:
    """Counts of all, shard by shard."""
    splits: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    patients = pa.array([], pa.string())
    for shard in iterate_shards(images, ["split", "patient_id"]):
        splits.update(_counts(shard["split"]))
        patients = pc.unique(pa.chunked_array([patients, *shard["patient_id"].chunks]))
    for shard in iterate_shards(quarantine, ["reason"]):
        reasons.update(_counts(shard["reason"]))
    report = label_report(images)
    return {
        "images": sum(splits.values()),
        "quarantined": sum(reasons.values()),
        "patients": len(patients),
        "splits": dict(splits),
        "labels": present(report),
        "label_report": report,
        "reasons": dict(reasons),
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {count["values"]: count["counts"] for count in pc.value_counts(column).to_pylist()}


def _example(quarantine: Folder) -> str:
    """One bad image, in words."""
    for shard in iterate_shards(quarantine, QUARANTINE.names):
        for row in shard.to_pylist():
            if row["reason"] not in NOT_WANTED:
                return f" (for one {row['uri']}: {row['reason']}, {row['detail']})"
    return ""


def check(counts: Metrics, quarantine: Folder, settings: Data) -> None:
    """Raise UserError when too little is left to learn from; say what was refused."""
    bad = counts["quarantined"] - sum(counts["reasons"].get(reason, 0) for reason in NOT_WANTED)
    seen = counts["images"] + counts["quarantined"]
    if bad > settings.max_bad_fraction * seen:
        raise too_many(bad, seen, settings.max_bad_fraction, quarantine)
    told = ", ".join(f"{n} {reason}" for reason, n in counts["reasons"].items())
    if bad:
        told += _example(quarantine)
    if not counts["images"]:
        raise UserError(f"none of the {seen} images is usable; quarantined: {told or 'none'}")
    if empty := split.empty(counts["splits"]):
        say(f"ingest: no usable image is left for {' and '.join(empty)}, and nothing can be learned without")
    if told:
        say(f"ingest: in quarantine {told}")
