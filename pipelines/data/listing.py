"""What a source holds.

Files are named relative to `data.root`, or where that is a list to the folder that its paths are relative to, so that
the images may move while a run is under way.
"""

from __future__ import annotations

import hashlib
import json
import posixpath

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.files import draw_by_path_hash
from pipelines.data.settings import DataSettings
from pipelines.data.sources import find_source, image_folder
from pipelines.tables.schemas import MANIFEST

BATCH = 10_000  # rows hashed at a time


def list_images(settings: DataSettings, seed: int) -> pa.Table:
    """The source's manifest, with `uri` relative to the folder of the images where it lies below it.

    Of it `data.images` are drawn, unless only headers tell which files are images.
    """
    table = find_source(settings.source).manifest(settings, seed)
    if not table["patient_id"].null_count:
        table = draw_by_path_hash(table, settings.images)
    if folder := image_folder(settings):
        below, uri = f"{folder.rstrip('/')}/", table["uri"]
        relative = pc.if_else(pc.starts_with(uri, below), pc.utf8_slice_codeunits(uri, len(below)), uri)
        table = table.set_column(table.schema.get_field_index("uri"), "uri", relative)
    return table


def present_uri(uri: str, settings: DataSettings) -> str:
    """Where an image of the manifest lies now."""
    folder = image_folder(settings)
    if "://" in uri or uri.startswith("/") or not folder:
        return uri
    return posixpath.join(folder, uri)


def listing_hash(table: pa.Table) -> str:
    """Tells one manifest from another by all that a source says of its images, but for where they lie."""
    digest = hashlib.sha256()
    columns = [name for name in MANIFEST.names if name != "uri" and name in table.column_names]
    for batch in table.select(columns).to_batches(BATCH):
        digest.update(json.dumps(batch.to_pylist()).encode())
    return digest.hexdigest()[:16]
