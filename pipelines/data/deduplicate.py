"""Duplicates: patients who share an image are treated as one person, and one copy of each image is kept.

The decisions are made once, from small columns, in a task of their own; then each shard that changes is rewritten by a
task that may be killed and repeated.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Folder
from pipelines.data.convert import quarantine_rows
from pipelines.data.duplicates import duplicate_groups, merged_groups
from pipelines.data.labels import STATE_COLUMNS
from pipelines.data.settings import DataSettings
from pipelines.monitor.progress import bar
from pipelines.tables.parquet import read_columns, read_shard, shard_name, write_file
from pipelines.tables.schemas import SPLITS
from pipelines.tables.shards import ShardOperator, run_shards

DECISIONS = "decided.parquet"  # in the manifest's folder
DUPLICATES = "duplicates.parquet"  # in the quarantine
COLUMNS = ("row", "uri", "sha256", "split", "patient_id", "phash", "structures", *STATE_COLUMNS)


def deduplicate(folder: Folder, settings: DataSettings) -> None:
    """Keep each person in one split and, unless data.deduplicate=false, one copy of each image.

    Patients who share an image count as one person under several names: all their images go to the most held-out of
    their splits (test, then val, then train). Of several copies the one with the most known findings is kept; ties go
    to the most structures in its mask, then to the most held-out split, then to the order of the manifest.
    After a kill, a second call reaches the same result.
    """
    import ray

    manifest = folder / "manifest"
    if not manifest.exists(DECISIONS):
        ray.get(ray.remote(max_retries=2)(_decide).remote(folder, settings))
    decided = read_shard(manifest, DECISIONS)
    lost = decided.filter(pc.is_null(decided["split"]))
    if lost.num_rows:
        write_file(folder / "quarantine", DUPLICATES,
                   quarantine_rows(lost["uri"], ["duplicate"] * lost.num_rows, lost["detail"]))
    blocks = _by_shard(decided.select(["row", "split"]), settings.shard_rows)
    with bar("ingest, duplicates", decided.num_rows, "decisions") as shown:
        run_shards(RewriteShard(folder / "images"), blocks, shown)


def _decide(folder: Folder, settings: DataSettings) -> None:
    write_file(folder / "manifest", DECISIONS, decide(read_columns(folder / "images", COLUMNS), settings))


def decide(images: pa.Table, settings: DataSettings) -> pa.Table:
    """The images that are dropped or change their split, in order of `row`.

    Args:
        images: COLUMNS of all images.
        settings: what counts as a duplicate, and whether duplicates are dropped.

    Returns:
        `row`, `uri`, and the new `split`; or for dropped images null, and the reason in `detail`.
    """
    hashes = _hashes(images["phash"]) if settings.near_duplicates is not None and images.num_rows else None
    group = duplicate_groups(_numbers(images["sha256"]), hashes, settings.near_duplicates)
    held_out = pc.index_in(images["split"], pa.array(SPLITS)).to_numpy()
    person = merged_groups(group, _numbers(images["patient_id"]))
    final = np.zeros(person.max(initial=0) + 1, held_out.dtype)
    np.maximum.at(final, person, held_out)
    keeper = np.arange(len(group))
    if settings.deduplicate:
        known, outlined = (sum(pc.fill_null(pc.list_value_length(images[name]), 0).to_numpy() for name in names)
                           for names in (STATE_COLUMNS, ["structures"]))
        best_first = np.lexsort((-held_out, -outlined, -known, group))
        _, heads = np.unique(group[best_first], return_index=True)
        keeper = best_first[heads][group]
    dropped = keeper != np.arange(len(group))
    rows = np.flatnonzero(dropped | (final[person] != held_out))
    chosen, stays = images.take(rows), images.take(keeper[rows])
    equal = pc.equal(chosen["sha256"], stays["sha256"]).to_pylist()
    details = [f"{'the same content as' if same else 'nearly the same image as'} {uri}" if lost else None
               for lost, same, uri in zip(dropped[rows], equal, stays["uri"].to_pylist(), strict=True)]
    splits = [None if lost else SPLITS[k] for lost, k in zip(dropped[rows], final[person[rows]], strict=True)]
    return pa.table({"row": chosen["row"], "uri": chosen["uri"], "split": pa.array(splits, pa.string()),
                     "detail": pa.array(details, pa.string())}).sort_by("row")


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """An integer code per distinct value, int (N,)."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy()


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Perceptual hashes, uint8 (N, 32)."""
    return np.frombuffer(column.cast(pa.binary(32)).combine_chunks().buffers()[1], np.uint8).reshape(-1, 32)


def _by_shard(decided: pa.Table, shard_rows: int) -> list[pa.Table]:
    """One table of decisions for each shard that has any, with the shard's number in `shard`."""
    shard = (decided["row"].to_numpy() // shard_rows).astype(np.int32)
    decided = decided.append_column("shard", pa.array(shard))
    numbers, starts, counts = np.unique(shard, return_index=True, return_counts=True)
    return [decided.slice(start, count) for _, start, count in zip(numbers, starts, counts, strict=True)]


class RewriteShard(ShardOperator):
    """Rewrites one shard of images without the dropped ones and with the decided splits."""

    def __init__(self, images: Folder) -> None:
        self.images = images

    def run(self, block: pa.Table) -> tuple[int, int]:
        name = shard_name(block["shard"][0].as_py())
        before = read_shard(self.images, name, ["row", "split"])
        if not apply_decisions(before, block).equals(before):  # else another attempt did it
            write_file(self.images, name, apply_decisions(read_shard(self.images, name), block))
        return block.num_rows, 0


def apply_decisions(shard: pa.Table, decided: pa.Table) -> pa.Table:
    """A shard without the dropped images and with the decided splits."""
    place = pc.index_in(shard["row"], decided["row"].combine_chunks())
    decision = decided["split"].take(place)
    column = shard.schema.get_field_index("split")
    stays = pc.or_(pc.is_null(place), pc.is_valid(decision))
    return shard.set_column(column, shard.schema.field(column), pc.coalesce(decision, shard["split"])).filter(stays)
