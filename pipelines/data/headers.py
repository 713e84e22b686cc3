"""What the headers of listed files say, read shard by shard by Ray Data and committed as it comes.

A tree of a million DICOM files is read once, however often the command is killed. Identifiers are hashed in the worker
that reads them: a patient's name is neither sent nor stored.
"""

from __future__ import annotations

import pyarrow as pa

from cluster.faults import retried
from cluster.storage import Folder
from pipelines.data.identifiers import Salt, hide_row
from pipelines.data.settings import Data
from pipelines.data.sources import find_source
from pipelines.monitor.progress import bar
from pipelines.tables.parquet import pending_shards, read_columns, read_shard, shard_count, shard_name, write_shard
from pipelines.tables.schemas import PLACED
from pipelines.tables.shards import Row, RowOperator, run_shards
from pipelines.tables.streaming import shard_numbers

ROWS = 4_096  # headers of a shard


def read_headers(out: Folder, listed: pa.Table, settings: Data, salt: Salt) -> pa.Table:
    """The rows of `listed` that are images, as their headers describe them, with identifiers hashed (schemas.PLACED).

    Args:
        out: of the manifest; what was read by a command that was cut off is taken from there.
        listed: the source's manifest before any file was opened.
        settings: what to take.
        salt: of the identifiers.

    """
    count = shard_count(listed.num_rows, ROWS)
    for index in pending_shards(out / "listed", count):
        write_shard(out / "listed", index, listed.slice(index * ROWS, ROWS))
    pending = pending_shards(out / "headers", count)
    with bar("ingest, headers", listed.num_rows) as shown:
        shown.to(listed.num_rows - sum(min(ROWS, listed.num_rows - index * ROWS) for index in pending))
        run_shards(Describe(out, settings, salt), shard_numbers(pending), shown)
    return read_columns(out / "headers", PLACED.names)


class Describe(RowOperator):
    """Reads the headers of one shard of listed files."""

    def __init__(self, manifest: Folder, settings: Data, salt: Salt) -> None:
        self.listed, self.headers = manifest / "listed", manifest / "headers"
        self.settings, self.salt = settings, salt

    def rows(self, shard: int) -> list[Row]:
        name = shard_name(shard)
        return retried(lambda: read_shard(self.listed, name), f"{self.listed.uri}/{name}").to_pylist()

    def one(self, row: Row) -> Row:
        described = find_source(self.settings.source).describe(row, self.settings)  # type: ignore[attr-defined]
        return {} if described is None else hide_row(described, self.salt)

    def killed(self, row: Row) -> Row:
        return hide_row(row | {"patient_id": row["path"]}, self.salt)

    def commit(self, shard: int, rows: list[Row]) -> tuple[int, int]:
        table = pa.Table.from_pylist([row for row in rows if row], schema=PLACED)
        retried(lambda: write_shard(self.headers, shard, table, replace=False),
                f"{self.headers.uri}/{shard_name(shard)}")
        return len(rows), 0
