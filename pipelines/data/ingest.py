"""Stage `ingest`: images of any source to clean, split, de-duplicated Parquet, one bad image costing one image.

The manifest is written once, in numbered shards, and Ray Data runs two operators over their numbers: decode and write.
A shard's quarantine rows are committed before its images, and the images' file is the marker that the shard is done: a
run killed anywhere goes on with the shards that are missing and neither loses nor doubles an image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data import identifiers, split
from pipelines.data.duplicates import groups, joined
from pipelines.data.image.picture import NOT_WANTED, Refused
from pipelines.data.labels import label_lines, label_report, present
from pipelines.data.settings import Data
from pipelines.data.sources import find_source
from pipelines.graph.settings import Settings
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import bar, say
from pipelines.tables.images import png
from pipelines.tables.parquet import (
    pending_shards,
    read_columns,
    read_shard,
    shard_count,
    shard_name,
    write_file,
    write_shard,
)
from pipelines.tables.schemas import IMAGES, QUARANTINE, SPLITS
from pipelines.tables.streaming import shard_numbers, stream

DUPLICATES = 99_999  # the number of the quarantine shard that holds the duplicates
FRONTAL = ("PA", "AP", "FRONTAL", "POSTERO", "ANTERO")  # how names of frontal views begin
AT_ONCE = 8  # images of a shard, most of them waiting for the storage
DECIDED = "decided.parquet"  # in the manifest: which duplicates go, and who changes the split
LISTED = "manifest.json"  # marks the manifest as whole


def ingest(stage: Stage) -> Metrics:
    """Returns counts of images, refused images and patients, by split and finding, the label report, and images/s."""
    data = stage.section(Data)
    images, quarantine, manifest = (stage.folder / name for name in ("images", "quarantine", "manifest"))
    rows = write_manifest(stage, manifest)
    pending = pending_shards(images, shard_count(rows, data.shard_rows))
    with bar("ingest", rows) as shown:
        shown.to(rows - sum(min(data.shard_rows, rows - index * data.shard_rows) for index in pending))
        speed = stream(shard_numbers(pending), [(Decode(manifest, data), {}), (Write(images, quarantine), {})], shown)
    drop_duplicates(images, quarantine, manifest, data)
    counts = summarise(images, quarantine)
    if counts["images"] + counts["quarantined"] != rows:
        raise RuntimeError(f"{stage.folder.uri} holds {counts['images']} images and {counts['quarantined']} refused "
                           f"ones of {rows}; remove it to have it done again")
    check(counts, quarantine, data)
    for line in label_lines(counts["label_report"]):
        say(f"ingest: {line}")
    return counts | {"source": data.source, "size": data.size} | ({"images_per_second": speed} if speed else {})


def observed(settings: Settings) -> dict[str, Any]:
    """What beside the settings shapes the result: the files that the source lists, and which salt hashes identifiers.

    Where the source has no files its images are a function of the seed.
    """
    listed = find_source(settings.data.source).contents(settings.data)
    seed = {"seed": settings.seed} if listed is None else {}
    return {"data.listed": listed, "data.salt": identifiers.which_salt()} | seed


def write_manifest(stage: Stage, out: Folder) -> int:
    """List the source's images with their splits, once.  Returns how many there are."""
    if listed := out.read_json(LISTED):
        return listed["rows"]
    data = stage.section(Data)
    manifest = split.assign(find_source(data.source).manifest(data, stage.seed), data)
    manifest = identifiers.hide(manifest, identifiers.salt_of(Folder(stage.settings.storage)))
    for index in range(shard_count(manifest.num_rows, data.shard_rows)):
        write_shard(out, index, manifest.slice(index * data.shard_rows, data.shard_rows))
    out.write_json(LISTED, {"rows": manifest.num_rows})
    return manifest.num_rows


class Decode:
    """Ray Data operator: the number of a shard of the manifest to its images, or to the reasons why not."""

    def __init__(self, manifest: Folder, settings: Data) -> None:
        self.manifest, self.settings = manifest, settings

    def __call__(self, block: pa.Table) -> pa.Table:
        index = block["shard"][0].as_py()
        listed = read_shard(self.manifest, shard_name(index)).to_pylist()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = [row | {"shard": index} for row in pool.map(self._row, listed)]
        return pa.Table.from_pylist(rows, schema=DECODED)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self.settings.frontal and row["view"] and not row["view"].upper().startswith(FRONTAL):
                raise Refused("not_frontal", f"the view is {row['view']}")
            decoded = find_source(self.settings.source).load(row, self.settings)
        except OSError:  # the storage's, and not this image's: the shard is tried again
            raise
        except Refused as refused:
            return row | {"reason": refused.reason, "detail": str(refused)}
        except Exception as error:  # one image must not stop the other 868,000
            return row | {"reason": "decoder_failed", "detail": f"{type(error).__name__} in decoding"}
        identity = decoded.sha256 if self.settings.deduplicate else f"{decoded.sha256}\0{row['source']}/{row['path']}"
        return row | {
            "image_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
            "image": png(decoded.image),
            "mask": None if decoded.mask is None else png(decoded.mask),
            **{name: getattr(decoded, name)
               for name in ("structures", "width", "height", "sha256", "box", "mapping", "erased", "phash")},
        }


DECODED = pa.schema([*IMAGES, *(f for f in QUARANTINE if f.name in ("reason", "detail")), ("shard", pa.int32())])


class Write:
    """Ray Data operator: commit one decoded shard, its refused rows first."""

    def __init__(self, images: Folder, quarantine: Folder) -> None:
        self.images, self.quarantine = images, quarantine

    def __call__(self, block: pa.Table) -> pa.Table:
        index = block["shard"][0].as_py()
        if self.images.exists(shard_name(index)):  # another attempt was faster: its rows and refusals belong together
            return pa.table({"rows": [block.num_rows]})
        refused = block.filter(pc.is_valid(block["reason"]))
        if refused.num_rows:
            write_shard(self.quarantine, index, quarantine_rows(refused["uri"], refused["reason"], refused["detail"]))
        else:
            self.quarantine.remove(shard_name(index))  # of an attempt that was cut off, and failed where this did not
        kept = block.filter(pc.is_null(block["reason"])).select(IMAGES.names)
        write_shard(self.images, index, kept.cast(IMAGES), replace=False)
        return pa.table({"rows": [block.num_rows]})


def quarantine_rows(uri: Any, reason: Any, detail: Any) -> pa.Table:
    return pa.table([uri, pa.array(["ingest"] * len(uri)), reason, detail], schema=QUARANTINE)


def drop_duplicates(images: Folder, quarantine: Folder, manifest: Folder, settings: Data) -> None:
    """Of images that are one picture keep the first, and move the others to quarantine.

    The first is the most held-out one (test, then val, then train; then manifest order). Patients who share a picture
    count as one person under several names: all their images go to the most held-out of their splits, so that no person
    is in two. Killed anywhere, a second call comes to the same end: what is to be done is decided once.
    """
    if not manifest.exists(DECIDED):
        write_file(manifest, DECIDED, decide(images, settings))
    decided = read_shard(manifest, DECIDED)
    lost = decided.filter(pc.is_null(decided["split"]))
    if lost.num_rows:
        write_shard(quarantine, DUPLICATES, quarantine_rows(lost["uri"], ["duplicate"] * lost.num_rows, lost["detail"]))
    known = decided["uri"].combine_chunks()
    for name in images.names(".parquet") if decided.num_rows else ():
        if pc.any(pc.is_in(read_shard(images, name, ["uri"])["uri"], known)).as_py():
            write_file(images, name, _applied(read_shard(images, name), decided))


def _applied(shard: pa.Table, decided: pa.Table) -> pa.Table:
    """A shard without the images that are to go, the others in the splits that were decided."""
    row = pc.index_in(shard["uri"], decided["uri"].combine_chunks())
    decision = decided["split"].take(row)
    column = shard.schema.get_field_index("split")
    split = pc.coalesce(decision, shard["split"])
    stays = pc.or_(pc.is_null(row), pc.is_valid(decision))
    return shard.set_column(column, shard.schema.field(column), split).filter(stays)


def decide(images: Folder, settings: Data) -> pa.Table:
    """The images that do not stay as they are: `uri`, the `split` they go to, or null and `detail` where they go."""
    table = read_columns(images, ["image_id", "uri", "split", "patient_id", "phash"])
    radius = settings.near_duplicates if settings.deduplicate else None
    hashes = None if radius is None else np.frombuffer(b"".join(table["phash"].to_pylist()), np.uint8).reshape(-1, 32)
    group = groups(table["image_id"].to_numpy(), hashes, radius)
    held_out = pc.index_in(table["split"], pa.array(SPLITS)).to_numpy()
    person = joined(group, np.unique(table["patient_id"].to_numpy(), return_inverse=True)[1])
    final = np.zeros(person.max(initial=0) + 1, held_out.dtype)
    np.maximum.at(final, person, held_out)
    best_first = np.lexsort((-held_out, group))
    _, heads = np.unique(group[best_first], return_index=True)
    keeper = best_first[heads][group]
    goes = keeper != np.arange(len(group))
    rows = np.flatnonzero(goes | (final[person] != held_out))
    chosen, stays = table.take(rows), table.take(keeper[rows])
    equal = pc.equal(chosen["image_id"], stays["image_id"]).to_pylist()
    details = [f"{'the same content as' if same else 'nearly the same picture as'} {uri}" if lost else None
               for lost, same, uri in zip(goes[rows], equal, stays["uri"].to_pylist(), strict=True)]
    splits = [None if lost else SPLITS[k] for lost, k in zip(goes[rows], final[person[rows]], strict=True)]
    return pa.table({"uri": chosen["uri"], "split": pa.array(splits, pa.string()),
                     "detail": pa.array(details, pa.string())})


def summarise(images: Folder, quarantine: Folder) -> Metrics:
    table, report = read_columns(images, ["split", "patient_id"]), label_report(images)
    reasons = Counter(read_columns(quarantine, ["reason"])["reason"].to_pylist()) if quarantine.names() else Counter()
    return {
        "images": table.num_rows,
        "quarantined": sum(reasons.values()),
        "patients": len(set(table["patient_id"].to_pylist())),
        "splits": dict(Counter(table["split"].to_pylist())),
        "labels": present(report),
        "label_report": report,
        "reasons": dict(reasons),
    }


def check(counts: Metrics, quarantine: Folder, settings: Data) -> None:
    """Raise UserError when too little is left to learn from; say what was refused."""
    bad = counts["quarantined"] - sum(counts["reasons"].get(reason, 0) for reason in NOT_WANTED)
    seen = counts["images"] + counts["quarantined"]
    told = ", ".join(f"{n} {reason}" for reason, n in counts["reasons"].items())
    if bad:
        rows = read_columns(quarantine, QUARANTINE.names).to_pylist()
        worst = next(row for row in rows if row["reason"] not in NOT_WANTED)
        told += f" (for one {worst['uri']}: {worst['reason']}, {worst['detail']})"
    if bad > settings.max_bad_fraction * seen:
        raise UserError(f"{bad} of {seen} images are bad, more than data.max_bad_fraction="
                         f"{settings.max_bad_fraction}: {told}; all are listed in {quarantine.uri}")
    if not counts["images"]:
        raise UserError(f"no usable image is left out of {seen}; quarantined: {told or 'none'}")
    if empty := split.empty(counts["splits"]):
        say(f"ingest: no usable image is left for {' and '.join(empty)}, and nothing can be learned without")
    if told:
        say(f"ingest: in quarantine {told}")
