"""A list of images that you wrote yourself: data.root is a CSV, TSV or Parquet file with a row per image.

Columns are path or uri (relative to the file, absolute, or a URI), and, each if you have it, patient_id, study_id,
view, labels, absent and uncertain (each a list, or joined by `|`), split (train, val or test) and mask (like path; its
bright pixels count). Where they are called otherwise, where a finding has a column of its own, or where the list names
DICOM files by what their headers hold, data.root is a YAML file that says so: its keys are those of `own_set.OwnSet`.

Without a column absent, a row that has labels is taken to be read for all labels of the list, and what it does not name
is absent; a row without labels is unlabelled. So is a DICOM file that no row names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cluster.errors import SetMistake, UserError
from cluster.faults import with_retries
from pipelines.data.files import BATCH, connect, manifest_table, read_image
from pipelines.data.findings import finding_columns
from pipelines.data.listing import listing_hash
from pipelines.data.own_cells import STATES
from pipelines.data.own_listing import check_folder, with_bytes
from pipelines.data.own_remarks import remarks
from pipelines.data.own_set import OwnSet, read_set, within
from pipelines.data.own_table import OwnTable
from pipelines.data.public_set import Card, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources import dicom
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded


class Manifest:
    def cards(self, settings: DataSettings) -> dict[str, Card]:
        return {"manifest": _set(settings).card}

    def manifest(self, settings: DataSettings, seed: int) -> pa.Table:
        """One row per row of the list, or per DICOM file; what is not there is refused when it is loaded.

        Raises:
            UserError: the list is not there, is empty, or lacks a column, or there are no images.
        """
        described = _set(settings)
        if described.key_is == "path":
            return _listed(described)
        for remark in _by_key(settings.root or "")[2]:  # now, as what is wrong with it, and not in every worker
            say(remark)
        check_folder(described)
        tree = Tree(described.folder(), described.card)
        return manifest_table({"source": "manifest", "uri": f"{tree.root}/{image.path}", "path": image.path,
                            **{key: [] for key in (*STATES, "masks")}, "bytes": tree.files[image.path]}
                           for image in dicom.images(tree, settings))

    def describe(self, row: Mapping[str, Any], settings: DataSettings) -> dict[str, Any] | None:
        """A DICOM file's header, joined with the row of the list that it names; None where the file is no DICOM.

        Raises:
            StorageUnavailable: it cannot be read from this node.
        """
        described, path = _set(settings), row["path"]
        folder = connect(described.folder())
        found = with_retries(lambda: dicom.read_header_of(folder, path, settings, described.key_is),
                             f"{folder.uri}/{path}")
        if found is None:
            return None
        image, key = found
        index, table, _ = _by_key(settings.root or "")
        listed = table.slice(index[key], 1).to_pylist()[0] if key in index else {}
        patient, alias = image.patient, listed.get("patient_id")
        if described.patient != OwnSet.patient:
            patient, alias = alias, patient
        return {**row, **{name: listed[name] for name in (*STATES, "split", "masks") if listed},
                "entry": index.get(key), "patient_id": patient or alias or path, "alias": alias,
                "study_id": image.study or listed.get("study_id"), "view": listed.get("view") or image.view,
                "refused": image.refused}

    def check_described(self, described: pa.Table, settings: DataSettings) -> None:
        """Say how many films have a row in the list, and how many of its rows name none.

        Args:
            described: `entry` of all films.
            settings: of the set.

        Raises:
            UserError: none has.
        """
        import pyarrow.compute as pc

        chosen = _set(settings)
        if chosen.key_is == "path":
            return
        films, entries = described.num_rows, len(_by_key(settings.root or "")[0])
        listed = films - described["entry"].null_count
        if not listed:
            raise UserError(f"{chosen.table}: none of the {films} films in {chosen.folder()} has a row; column "
                            f"{chosen.key!r} must hold what their headers hold as {chosen.key_is}")
        say(f"{chosen.table}: {listed:,} of {films:,} films have a row; "
            f"{entries - pc.count_distinct(described['entry']).as_py():,} of {entries:,} rows name no film")

    def description_hash(self, settings: DataSettings) -> str:
        """A hash of what `describe` joins to DICOM files; "" for a list whose rows name files."""
        described = _set(settings)
        if described.key_is == "path":
            return ""
        index, table, _ = _by_key(settings.root or "")
        joined = [described.key_is, described.patient != OwnSet.patient, list(index), listing_hash(table)]
        return hashlib.sha256(json.dumps(joined).encode()).hexdigest()[:16]

    def load(self, row: Mapping[str, Any], settings: DataSettings) -> Decoded:
        return read_image(_set(settings).folder(), row["path"], row, settings, listed=row.get("bytes") is not None)

    def image_folder(self, root: str) -> str:
        """The folder that the paths of the list at `root` are relative to."""
        return _described(root).folder()

    def raw_folder(self, root: str) -> str:
        """The folder that the description names, or that is searched for DICOM files; else `root`, the list alone."""
        described = read_set(root)
        return described.images or (root if described.key_is == "path" else described.folder())


def assess(listed: pa.Table, exhaustive: bool = True) -> pa.Table:
    """The rows with the states of their findings in canonical names.

    Args:
        listed: manifest with findings in the source's own words.
        exhaustive: A row that has labels was read for all labels of the list: what it does not name is absent.
    """
    import pyarrow.compute as pc

    known = pc.unique(pc.list_flatten(listed["labels"])).to_pylist() if exhaustive else []
    return manifest_table(
        row | finding_columns(row["source"], row["labels"], row["uncertain"], row["absent"],
                              known if row["labels"] else ())
        for batch in listed.to_batches(BATCH) for row in batch.to_pylist())


def _set(settings: DataSettings) -> OwnSet:
    if not settings.root:
        raise UserError("data=manifest needs data.root=FILE, a CSV, TSV or Parquet file with a column path or uri, or "
                        "a YAML file that describes one")
    return _described(settings.root)


@lru_cache(maxsize=16)
def _described(root: str) -> OwnSet:
    """The description, read once for all rows."""
    return read_set(root)


def _listed(described: OwnSet) -> pa.Table:
    """The manifest of a table whose rows name files."""
    own, base = OwnTable(described), described.folder()
    if own.columns["patient"] is None:
        say(f"{described.table} has no column {described.patient}: each image counts as a patient of its own")

    def rows() -> Iterator[dict[str, Any]]:
        for row in own.rows():
            key = row.pop("key")
            yield row | {"source": "manifest", "uri": within(base, key), "path": key,
                         "patient_id": row["patient_id"] or key}

    found = assess(manifest_table(rows()), own.exhaustive)
    if not found.num_rows:
        raise SetMistake(f"{described.table} lists no image: its column {own.key!r} is empty")
    for remark in remarks(own, found):
        say(remark)
    return with_bytes(found, described)


@lru_cache(maxsize=2)
def _by_key(root: str) -> tuple[dict[str, int], pa.Table, list[str]]:
    """Of a table whose rows name what headers hold: the number of each key's row, the rows as a manifest, remarks."""
    own = OwnTable(read_set(root))
    index: dict[str, int] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for row in own.rows():
            index[row.pop("key")] = len(index)
            yield row | {"source": "manifest"}

    table = assess(manifest_table(rows()), own.exhaustive)
    return index, table, remarks(own, table)


SOURCE = Manifest()
