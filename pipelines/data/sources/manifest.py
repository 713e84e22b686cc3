"""A list of images that you wrote yourself: data.root is a CSV, TSV or Parquet file with a row per image.

Columns are path or uri (relative to the file, absolute, or a URI), and, each if you have it, patient_id, study_id,
view, labels, absent and uncertain (each a list, or joined by `|`), split (train, val or test) and mask (like path; its
bright pixels count). Without a column absent, a row that has labels is taken to be read for all labels of the list, and
what it does not name is absent; a row without labels is unlabelled.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data.files import connect, fair_draw, read_image
from pipelines.data.findings import states
from pipelines.data.public_set import Card, read_csv
from pipelines.data.settings import Data
from pipelines.data.sources.folder import SPLIT_NAMES
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded

CARD = Card(
    title="manifest",
    images=0,
    where="its author (any CSV or Parquet file with a column path or uri will do)",
    licence="its owner's",
    citation="",
    masks=("mask",),
)


class Manifest:
    name, card = "manifest", CARD

    def manifest(self, settings: Data, seed: int) -> pa.Table:
        """One row per row of the list; what is not there is refused when it is loaded.

        Raises:
            UserError: the list is not there, is empty, or lacks a column.
        """
        return as_table(self.rows(settings), settings)

    def rows(self, settings: Data) -> list[dict[str, Any]]:
        """Rows of the manifest, with `masks`."""
        root = _root(settings)
        base = root.rpartition("/")[0]
        table = _table(root)
        key = next((name for name in ("uri", "path") if name in table.column_names), None)
        if key is None:
            raise UserError(f"{root} has no column 'path' or 'uri'; it has {', '.join(table.column_names)}")
        if "patient_id" not in table.column_names:
            say(f"{root} has no column patient_id: each image counts as a patient of its own")
        rows = assess([_row(row, key, base) for batch in table.to_batches() for row in batch.to_pylist() if row[key]],
                      "absent" not in table.column_names)
        if not rows:
            raise UserError(f"{root} lists no image: its column {key!r} is empty")
        once = {row["uri"]: row for row in reversed(rows)}
        if len(once) < len(rows):
            say(f"{root} lists {len(rows) - len(once)} images again; the first row of each counts")
        return list(reversed(once.values()))

    def load(self, row: Mapping[str, Any], settings: Data) -> Decoded:
        folder, _, name = row["uri"].rpartition("/")
        return read_image(folder, name, row, settings, listed=False)


def as_table(rows: list[dict[str, Any]], settings: Data) -> pa.Table:
    """The rows in their order, or the `data.images` of them that are a fair draw, the same whatever else there is."""
    import pyarrow as pa

    from pipelines.tables.schemas import MANIFEST

    rows = [rows[k] for k in fair_draw([row["path"] for row in rows], settings.images)]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def assess(rows: list[dict[str, Any]], exhaustive: bool = True) -> list[dict[str, Any]]:
    """The rows with the states of their findings in canonical names.

    Args:
        exhaustive: A row that has labels was read for all labels of the list: what it does not name is absent.
    """
    known = dict.fromkeys(label for row in rows for label in row["labels"]) if exhaustive else {}
    return [row | states(row["source"], row["labels"], row["uncertain"], row["absent"], known if row["labels"] else ())
            for row in rows]


def _list(value: Any) -> list[str]:
    """A cell that is a list, or a text joined by `|`."""
    parts = (value or "").split("|") if value is None or isinstance(value, str) else value
    return [str(part).strip() for part in (parts if isinstance(parts, list) else [parts])
            if part is not None and str(part).strip()]


def _row(row: dict[str, Any], key: str, base: str) -> dict[str, Any]:
    split = str(row.get("split") or "").strip().lower()
    if split and split not in SPLIT_NAMES:
        raise UserError(f"{row[key]}: split {split!r} is none of {', '.join(SPLIT_NAMES)}")
    return {
        "source": "manifest", "uri": _absolute(row[key], base), "path": row.get("path") or row[key],
        **{name: str(value) if (value := row.get(name)) not in (None, "") else None
           for name in ("study_id", "view")},
        "patient_id": str(value) if (value := row.get("patient_id")) not in (None, "") else row[key],
        **{name: _list(row.get(name)) for name in ("labels", "absent", "uncertain")}, "split": SPLIT_NAMES.get(split),
        "masks": [{"name": "mask", "path": _absolute(row["mask"], base), "rle": None}] if row.get("mask") else [],
    }


def _table(root: str) -> pa.Table:
    from pyarrow import ArrowInvalid, parquet

    try:
        content = _read(root)
    except OSError as error:
        raise UserError(f"data.root={root!r} cannot be read: {error}; data=manifest needs a CSV, TSV or Parquet "
                         "file") from error
    try:
        if content[:4] == b"PAR1":
            return parquet.read_table(io.BytesIO(content))
        delimiter = "\t" if ".tsv" in root.rsplit("/", 1)[-1].lower() else ","
        return read_csv(content, gzipped=content[:2] == b"\x1f\x8b", delimiter=delimiter)
    except ArrowInvalid as error:
        raise UserError(f"{root} is no table: {error}") from error


def _root(settings: Data) -> str:
    if not settings.root:
        raise UserError("data=manifest needs data.root=FILE, a CSV, TSV or Parquet file with a column path or uri")
    return Folder(settings.root).uri


def _absolute(path: str, base: str) -> str:
    return path if "://" in path or path.startswith("/") else f"{base}/{path}"


def _read(uri: str) -> bytes:
    folder, _, name = uri.rpartition("/")
    return connect(folder).read(name)


SOURCE = Manifest()
