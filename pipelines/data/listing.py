"""What a source holds, listed once a command, split, and committed in numbered shards.

The manifest names files relative to `data.root`, so that the images may move while a run is under way.
"""

from __future__ import annotations

import hashlib
import json
import posixpath

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data import identifiers, split
from pipelines.data.files import fair_draw
from pipelines.data.headers import read_headers
from pipelines.data.settings import Data
from pipelines.data.sources import find_source
from pipelines.tables.parquet import shard_count, write_shard
from pipelines.tables.schemas import MANIFEST

LISTED = "manifest.json"  # marks the manifest as whole
BATCH = 10_000  # rows hashed at a time
_listed: dict[str, pa.Table] = {}  # what a command listed for the fingerprint, until its manifest is written


def list_images(settings: Data, seed: int) -> pa.Table:
    """The source's manifest, with `uri` relative to data.root where it lies below it; kept for `write_manifest`.

    Of it `data.images` are drawn, unless only headers tell which files are images.
    """
    table = find_source(settings.source).manifest(settings, seed)
    if not table["patient_id"].null_count:
        table = fair_draw(table, settings.images)
    if settings.root:
        below, uri = f"{settings.root.rstrip('/')}/", table["uri"]
        relative = pc.if_else(pc.starts_with(uri, below), pc.utf8_slice_codeunits(uri, len(below)), uri)
        table = table.set_column(table.schema.get_field_index("uri"), "uri", relative)
    _listed.clear()
    _listed[_key(settings, seed)] = table
    return table


def write_manifest(out: Folder, settings: Data, seed: int, storage: Folder) -> int:
    """Commit the source's images with their splits and hashed identifiers, once.  Returns how many there are."""
    if listed := out.read_json(LISTED):
        return listed["rows"]
    table = _listed.pop(_key(settings, seed), None)
    if table is None:
        table = list_images(settings, seed)
    _listed.clear()
    manifest = split.assign(_identified(out, table, settings, identifiers.salt_of(storage)), settings)
    for index in range(shard_count(manifest.num_rows, settings.shard_rows)):
        write_shard(out, index, manifest.slice(index * settings.shard_rows, settings.shard_rows))
    out.write_json(LISTED, {"rows": manifest.num_rows})
    return manifest.num_rows


def _identified(out: Folder, listed: pa.Table, settings: Data, salt: identifiers.Salt) -> pa.Table:
    """What is listed, with hashed identifiers (schemas.PLACED), those of headers read first, and `data.images` of it.

    Raises:
        UserError: no file is an image.
    """
    silent = pc.is_null(listed["patient_id"])
    table = identifiers.hide(listed.filter(pc.invert(silent)), salt)
    if not pc.any(silent).as_py():
        return table
    table = pa.concat_tables([table, read_headers(out, listed.filter(silent), settings, salt)])
    if not table.num_rows:
        raise UserError(f"data.root={settings.root!r}: none of its {listed.num_rows} files is an image of "
                        f"data={settings.source}")
    return fair_draw(table, settings.images)


def _key(settings: Data, seed: int) -> str:
    return repr((settings, seed))


def present_uri(uri: str, settings: Data) -> str:
    """Where an image of the manifest lies now."""
    if "://" in uri or uri.startswith("/") or not settings.root:
        return uri
    return posixpath.join(settings.root, uri)


def listing_hash(table: pa.Table) -> str:
    """Tells one manifest from another by all that a source says of its images, but for where they lie."""
    told = hashlib.sha256()
    columns = [name for name in MANIFEST.names if name != "uri" and name in table.column_names]
    for batch in table.select(columns).to_batches(BATCH):
        told.update(json.dumps(batch.to_pylist()).encode())
    return told.hexdigest()[:16]
