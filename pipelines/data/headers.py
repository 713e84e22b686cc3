"""Metadata from the headers of listed files, read by Ray Data and committed shard by shard.

A tree of a million DICOM files is read once, however often the command is killed. Identifiers are hashed in the worker
that reads them: a patient's name is neither transferred nor stored.
"""

from __future__ import annotations

import pyarrow as pa

from cluster.storage import Folder
from pipelines.data.identifiers import Salt, pseudonymise_row
from pipelines.data.settings import DataSettings
from pipelines.data.sources import find_source
from pipelines.monitor.progress import bar
from pipelines.tables.parquet import pending_shards, read_shard, shard_count, shard_name, write_shard
from pipelines.tables.schemas import HASHED_MANIFEST
from pipelines.tables.shards import Row, RowOperator, run_shards
from pipelines.tables.streaming import shard_numbers

ROWS = 4_096  # headers per shard
LISTED, HEADERS = "listed", "headers"  # folders of the manifest


def list_headers(out: Folder, listed: pa.Table) -> int:
    """Commit the listed rows whose files' headers must be read.  Returns their number."""
    for index in pending_shards(out / LISTED, shard_count(listed.num_rows, ROWS)):
        write_shard(out / LISTED, index, listed.slice(index * ROWS, ROWS))
    return listed.num_rows


def read_headers(out: Folder, rows: int, settings: DataSettings, salt: Salt) -> None:
    """Commit the listed rows that are images to HEADERS, with the metadata of their files and hashed identifiers
    (schemas.HASHED_MANIFEST); what an interrupted command has read is not read again.

    Args:
        out: folder of the manifest.
        rows: number of listed rows.
        settings: which images are in scope.
        salt: of the identifiers.
    """
    pending = pending_shards(out / HEADERS, shard_count(rows, ROWS))
    with bar("ingest, headers", rows) as shown:
        shown.to(rows - sum(min(ROWS, rows - index * ROWS) for index in pending))
        run_shards(ReadHeaders(out, settings, salt), shard_numbers(pending), shown)


class ReadHeaders(RowOperator):
    """Reads the headers of one shard of listed files."""

    def __init__(self, manifest: Folder, settings: DataSettings, salt: Salt) -> None:
        self.listed, self.headers = manifest / LISTED, manifest / HEADERS
        self.settings, self.salt = settings, salt

    def rows(self, shard: int) -> list[Row]:
        return read_shard(self.listed, shard_name(shard)).to_pylist()

    def one(self, row: Row) -> Row:
        described = find_source(self.settings.source).describe(row, self.settings)  # type: ignore[attr-defined]
        return {} if described is None else pseudonymise_row(described, self.salt)

    def killed(self, row: Row) -> Row:
        return pseudonymise_row(row | {"patient_id": row["path"]}, self.salt)

    def commit(self, shard: int, rows: list[Row]) -> tuple[int, int]:
        table = pa.Table.from_pylist([row for row in rows if row], schema=HASHED_MANIFEST)
        write_shard(self.headers, shard, table, replace=False)
        return len(rows), 0
