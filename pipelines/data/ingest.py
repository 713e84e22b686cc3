"""Stage `ingest`: images of any source to clean, split, de-duplicated Parquet; one bad image costs one image.

The manifest is written once, in numbered shards, and Ray Data runs over their numbers (`convert`); then duplicates are
found and their shards rewritten (`deduplicate`). After a kill the same command reaches the same result.
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
from pipelines.data.convert import ConvertShard
from pipelines.data.deduplicate import deduplicate
from pipelines.data.image.picture import NOT_WANTED
from pipelines.data.labels import label_lines, label_report, present
from pipelines.data.manifest import list_and_hash, write_manifest
from pipelines.data.settings import DataSettings
from pipelines.data.sources import cards_of
from pipelines.graph.settings import Settings
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import bar, say
from pipelines.tables.parquet import iterate_shards, pending_shards, shard_count
from pipelines.tables.schemas import QUARANTINE
from pipelines.tables.shards import run_shards
from pipelines.tables.streaming import shard_numbers

ENOUGH = 1_000  # images after which too many bad ones stop the run early


def ingest(stage: Stage) -> Metrics:
    """Returns counts of images, refused images and patients, by split and finding, the label report, and images/s.

    Raises:
        StorageUnavailable: the storage fails on every node, or repeatedly for one image.
        UserError: too many images are bad, or none is usable.
    """
    data, folder = stage.section(DataSettings), stage.folder
    images, quarantine = folder / "images", folder / "quarantine"
    rows = write_manifest(folder / "manifest", data, stage.seed, Folder(stage.settings.storage))
    pending = pending_shards(images, shard_count(rows, data.shard_rows))
    mixed = np.random.default_rng(0).permutation(pending).tolist()  # so that the first shards represent the whole set
    with bar("ingest", rows) as shown:
        shown.to(rows - sum(min(data.shard_rows, rows - index * data.shard_rows) for index in pending))
        speed = run_shards(ConvertShard(folder, data), shard_numbers(mixed), shown, BadImages(rows, quarantine, data))
    deduplicate(folder, data)
    counts = summarise(images, quarantine)
    if counts["images"] + counts["quarantined"] != rows:
        raise RuntimeError(f"{folder.uri} holds {counts['images']} images and {counts['quarantined']} rejected ones of "
                           f"{rows}; remove it and run the stage again")
    check(counts, quarantine, data)
    for line in label_lines(counts["label_report"]):
        say(f"ingest: {line}")
    terms = {name: {"title": card.title, "licence": card.licence, "citation": card.citation, "sign": card.sign}
             for name, card in cards_of(data).items()}
    counts |= {"source": data.source, "size": data.size, "terms": terms}
    return counts | ({"images_per_second": speed} if speed else {})


def observed(settings: Settings) -> dict[str, Any]:
    """External inputs of the result: a hash of the listing, and which salt hashes the identifiers."""
    return {"data.listed": list_and_hash(settings.data, settings.seed), "data.salt": identifiers.salt_fingerprint()}


class BadImages:
    """Stops the run once ENOUGH images were processed and too many of them are bad."""

    def __init__(self, total: int, quarantine: Folder, settings: DataSettings) -> None:
        self.enough, self.quarantine, self.limit = min(total, ENOUGH), quarantine, settings.max_bad_fraction
        self.seen = self.bad = 0

    def __call__(self, rows: int, bad: int) -> None:
        self.seen += rows
        self.bad += bad
        if self.seen >= self.enough and self.bad > self.limit * self.seen:
            raise too_many(self.bad, self.seen, self.limit, self.quarantine)


def too_many(bad: int, seen: int, limit: float, quarantine: Folder) -> UserError:
    return UserError(f"{bad} of {seen} images are bad, more than data.max_bad_fraction={limit} allows"
                     f"{_example(quarantine)}; all are listed in {quarantine.uri}")


def summarise(images: Folder, quarantine: Folder) -> Metrics:
    """Counts over the whole set, shard by shard."""
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
    """One bad image with its reason, in words."""
    for shard in iterate_shards(quarantine, QUARANTINE.names):
        for row in shard.to_pylist():
            if row["reason"] not in NOT_WANTED:
                return f" (for example {row['uri']}: {row['reason']}, {row['detail']})"
    return ""


def check(counts: Metrics, quarantine: Folder, settings: DataSettings) -> None:
    """Raise UserError if too many images are bad or none is usable; report what was rejected."""
    bad = counts["quarantined"] - sum(counts["reasons"].get(reason, 0) for reason in NOT_WANTED)
    seen = counts["images"] + counts["quarantined"]
    if bad > settings.max_bad_fraction * seen:
        raise too_many(bad, seen, settings.max_bad_fraction, quarantine)
    rejected = ", ".join(f"{n} {reason}" for reason, n in counts["reasons"].items())
    if bad:
        rejected += _example(quarantine)
    if not counts["images"]:
        raise UserError(f"none of the {seen} images is usable; quarantined: {rejected or 'none'}")
    if empty := split.empty(counts["splits"]):
        say(f"ingest: no usable image is left for {' and '.join(empty)}; training needs all three splits")
    if rejected:
        say(f"ingest: in quarantine {rejected}")
