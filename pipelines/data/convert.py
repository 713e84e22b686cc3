"""Ray Data operator of ingest: converts a shard of the manifest to images, and quarantines those that are bad.

A shard's quarantine rows are committed before its images, and the images' file marks the shard as done: after a kill
the missing shards are converted, and no image is lost or doubled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cluster.errors import UserError
from cluster.faults import with_retries
from cluster.storage import Folder
from pipelines.data.image.picture import NOT_WANTED, Refused
from pipelines.data.listing import present_uri
from pipelines.data.settings import DataSettings
from pipelines.data.sources import find_source
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import read_shard, shard_name, write_shard
from pipelines.tables.schemas import IMAGES, QUARANTINE
from pipelines.tables.shards import Row, RowOperator

FRONTAL = ("PA", "AP", "FRONTAL", "POSTERO", "ANTERO")  # prefixes of the names of frontal views


class ConvertShard(RowOperator):
    """Decodes, cleans and commits one shard.

    Args:
        folder: of the stage; contains `manifest`, `images` and `quarantine`.
        settings: how to clean the images.
    """

    def __init__(self, folder: Folder, settings: DataSettings) -> None:
        self.manifest, self.images, self.quarantine = (folder / name for name in ("manifest", "images", "quarantine"))
        self.settings = settings

    def rows(self, shard: int) -> list[Row]:
        name, start = shard_name(shard), shard * self.settings.shard_rows
        listed = read_shard(self.manifest, name).to_pylist()
        return [row | {"row": start + k, "uri": present_uri(row["uri"], self.settings)} for k, row in enumerate(listed)]

    def one(self, row: Row) -> Row:
        try:
            if self.settings.frontal and row["view"] and not row["view"].upper().startswith(FRONTAL):
                raise Refused("not_frontal", f"the view is {row['view']}")
            decoded = find_source(self.settings.source).load(row, self.settings)
        except (OSError, UserError, MemoryError):  # due to the storage, the listing or the node, not to this image
            raise
        except Refused as refused:
            return row | {"reason": refused.reason, "detail": str(refused)}
        except Exception as error:  # one image must not stop the other 868,000
            return row | {"reason": "decoder_failed", "detail": f"{type(error).__name__} in decoding"}
        identity = decoded.sha256 if self.settings.deduplicate else f"{decoded.sha256}\0{row['source']}/{row['path']}"
        return row | {
            "image_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
            "image": encode_png(decoded.image),
            "mask": None if decoded.mask is None else encode_png(decoded.mask),
            **{name: getattr(decoded, name)
               for name in ("structures", "width", "height", "sha256", "box", "mapping", "erased", "phash")},
        }

    def killed(self, row: Row) -> Row:
        return row | {"reason": "killed_its_worker", "detail": "decoding it crashes the process or exhausts its memory"}

    def commit(self, shard: int, rows: list[Row]) -> tuple[int, int]:
        refused = [row for row in rows if "reason" in row]
        bad = sum(row["reason"] not in NOT_WANTED for row in refused)
        kept = pa.Table.from_pylist([row for row in rows if "reason" not in row], schema=IMAGES)
        with_retries(lambda: self._write(shard, kept, refused), f"{self.images.uri}/{shard_name(shard)}")
        return len(rows), bad

    def _write(self, shard: int, kept: pa.Table, refused: Sequence[Row]) -> None:
        if self.images.exists(shard_name(shard)):  # by another attempt, with its quarantine rows
            return
        if refused:
            write_shard(self.quarantine, shard, quarantine_rows(*(
                [row[name] for row in refused] for name in ("uri", "reason", "detail"))))
        else:
            self.quarantine.remove(shard_name(shard))  # left by an interrupted attempt with other failures
        write_shard(self.images, shard, kept, replace=False)


def quarantine_rows(uri: Any, reason: Any, detail: Any) -> pa.Table:
    """A quarantine table from columns of equal length."""
    return pa.table([uri, ["ingest"] * len(uri), reason, detail], names=QUARANTINE.names).cast(QUARANTINE)
