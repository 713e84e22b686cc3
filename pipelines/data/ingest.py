"""Stage `ingest`: images of any source to clean, split, de-duplicated Parquet, one bad image costing one image.

Ray Data runs two operators, decode and write, over numbered shards of the manifest. A shard's quarantine rows are
committed before its images, and the images' file is the marker that the shard is done: a run killed anywhere goes on
with the shards that are missing and neither loses nor doubles an image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pyarrow as pa

from cluster.storage import Folder
from pipelines.data import split
from pipelines.data.decode import Refused
from pipelines.data.records import IMAGES, QUARANTINE, SPLITS
from pipelines.data.sources import find_source
from pipelines.data.streaming import stream
from pipelines.data.tables import pending_shards, png, read_shard, read_table, shard_count, shard_name, write_shard
from pipelines.progress import bar, say
from pipelines.settings import Data
from pipelines.stage import Metrics, Stage

DUPLICATES = 99_999  # the number of the quarantine shard that holds the duplicates


def ingest(stage: Stage) -> Metrics:
    """Returns the counts of images, refused images and patients, by split and by label, and images/s."""
    data = stage.settings.data
    images, quarantine = stage.folder / "images", stage.folder / "quarantine"
    manifest = split.assign(find_source(data.source).manifest(data, stage.settings.seed), data)
    pending = pending_shards(images, shard_count(manifest.num_rows, data.shard_rows))
    blocks = [shard_rows(manifest, index, data.shard_rows) for index in pending]
    with bar("ingest", manifest.num_rows) as shown:
        shown.to(manifest.num_rows - sum(block.num_rows for block in blocks))
        speed = stream(blocks, [(Decode(data), {}), (Write(images, quarantine), {})], shown)
    drop_duplicates(images, quarantine)
    counts = summarise(images, quarantine)
    check(counts, quarantine, data)
    return counts | ({"images_per_second": speed} if speed else {})


def shard_rows(manifest: pa.Table, index: int, rows: int) -> pa.Table:
    block = manifest.slice(index * rows, rows)
    return block.append_column("shard", pa.array([index] * block.num_rows, pa.int32()))


class Decode:
    """Ray Data operator: manifest rows to images, or to the reason why not."""

    def __init__(self, settings: Data) -> None:
        self.settings = settings

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = [self._row(row) for row in block.to_pylist()]
        return pa.Table.from_pylist(rows, schema=DECODED)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            decoded = find_source(row["source"]).load(row["uri"], self.settings)
        except Refused as refused:
            return row | {"reason": refused.reason, "detail": str(refused)}
        except Exception as error:  # one image must not stop the other 868,000
            return row | {"reason": "decoder_failed", "detail": f"{type(error).__name__}: {error}"}
        identity = decoded.sha256 if self.settings.deduplicate else f"{decoded.sha256}\0{row['path']}"
        return row | {
            "image_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
            "image": png(decoded.image),
            "width": decoded.width,
            "height": decoded.height,
            "sha256": decoded.sha256,
        }


DECODED = pa.schema([*IMAGES, *(f for f in QUARANTINE if f.name in ("reason", "detail")), ("shard", pa.int32())])


class Write:
    """Ray Data operator: commit one decoded shard, its refused rows first."""

    def __init__(self, images: Folder, quarantine: Folder) -> None:
        self.images, self.quarantine = images, quarantine

    def __call__(self, block: pa.Table) -> pa.Table:
        index = block["shard"][0].as_py()
        refused = block.filter(pa.compute.is_valid(block["reason"]))
        if refused.num_rows:
            write_shard(self.quarantine, index, quarantine_rows(refused["uri"], refused["reason"], refused["detail"]))
        else:
            self.quarantine.remove(shard_name(index))  # of an attempt that was cut off, and failed where this did not
        kept = block.filter(pa.compute.is_null(block["reason"])).select(IMAGES.names)
        write_shard(self.images, index, kept.cast(IMAGES))
        return pa.table({"rows": [block.num_rows]})


def quarantine_rows(uri: Any, reason: Any, detail: Any) -> pa.Table:
    return pa.table([uri, pa.array(["ingest"] * len(uri)), reason, detail], schema=QUARANTINE)


def drop_duplicates(images: Folder, quarantine: Folder) -> None:
    """Of images with one image_id keep the first, and move the others to quarantine.

    The first is the most held-out one (test, then val, then train; then manifest order), so that what a duplicate
    would leak into training goes. Killed anywhere, a second call comes to the same end.
    """
    table = read_table(images, ["image_id", "uri", "split"])
    ids, uris, splits = (table[name].to_pylist() for name in ("image_id", "uri", "split"))
    first: dict[str, int] = {}
    for row, image_id in enumerate(ids):
        best = first.setdefault(image_id, row)
        if SPLITS.index(splits[row]) > SPLITS.index(splits[best]):
            first[image_id] = row
    losers = [row for row, image_id in enumerate(ids) if first[image_id] != row]
    if not losers:
        return
    earlier = read_shard(quarantine, name).slice(0) if quarantine.exists(name := shard_name(DUPLICATES)) else None
    rows = quarantine_rows([uris[r] for r in losers], ["duplicate"] * len(losers),
                           [f"the same content as {uris[first[ids[r]]]}" for r in losers])
    if earlier is not None:
        known = set(earlier["uri"].to_pylist())
        rows = pa.concat_tables([earlier, rows.filter([uri not in known for uri in rows["uri"].to_pylist()])])
    write_shard(quarantine, DUPLICATES, rows)
    lost = {uris[row] for row in losers}
    for name in images.names(".parquet"):
        shard = read_shard(images, name)
        keep = [uri not in lost for uri in shard["uri"].to_pylist()]
        if not all(keep):
            write_shard(images, int(name[5:10]), shard.filter(keep))


def summarise(images: Folder, quarantine: Folder) -> Metrics:
    table = read_table(images, ["split", "patient_id", "labels"])
    reasons = Counter(read_table(quarantine, ["reason"])["reason"].to_pylist()) if quarantine.names() else Counter()
    return {
        "images": table.num_rows,
        "quarantined": sum(reasons.values()),
        "patients": len(set(table["patient_id"].to_pylist())),
        "splits": dict(Counter(table["split"].to_pylist())),
        "labels": dict(Counter(label for labels in table["labels"].to_pylist() for label in labels)),
        "reasons": dict(reasons),
    }


def check(counts: Metrics, quarantine: Folder, settings: Data) -> None:
    """Raise ValueError when too little is left to learn from; say what was refused."""
    bad = counts["quarantined"] - counts["reasons"].get("duplicate", 0)
    seen = counts["images"] + counts["quarantined"]
    told = ", ".join(f"{n} {reason}" for reason, n in counts["reasons"].items())
    if bad:
        worst = next(row for row in read_table(quarantine).to_pylist() if row["reason"] != "duplicate")
        told += f" (for one {worst['uri']}: {worst['reason']}, {worst['detail']})"
    if bad > settings.max_bad_fraction * seen:
        raise ValueError(f"{bad} of {seen} images are bad, more than data.max_bad_fraction="
                         f"{settings.max_bad_fraction}: {told}; all are listed in {quarantine.uri}")
    empty = [name for name in SPLITS if not counts["splits"].get(name)]
    if empty:
        raise ValueError(f"no usable image is left for {' and '.join(empty)} out of {seen}; "
                         f"quarantined: {told or 'none'}")
    if told:
        say(f"ingest: in quarantine {told}")
