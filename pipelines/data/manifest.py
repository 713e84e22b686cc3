"""The manifest of ingest: what a source lists, split, and committed once in numbered shards.

The list is as long as the set and the driver lives as long as the run, so that subprocesses make the list, and the
manifest from it. The list holds identifiers that are not hashed yet: it lies in a file without a name, which is gone
when the command ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import feather

from cluster.errors import UserError
from cluster.storage import Folder
from cluster.tasks import run_in_subprocess
from pipelines.data import identifiers, split
from pipelines.data.files import draw_by_path_hash
from pipelines.data.headers import HEADERS, list_headers, read_headers
from pipelines.data.listing import list_images, listing_hash
from pipelines.data.settings import DataSettings
from pipelines.data.sources import check_described, description_hash, find_source
from pipelines.tables.parquet import read_columns, shard_count, write_shard
from pipelines.tables.schemas import HASHED_MANIFEST

COMPLETE = "manifest.json"  # marks the manifest as whole
_lists: dict[str, IO[bytes]] = {}  # lists that this command made, until their manifests are written


def list_and_hash(settings: DataSettings, seed: int) -> str:
    """A hash of the images that the source lists now and of all that it says of them.

    The list is kept for `write_manifest`.

    Raises:
        UserError: the set is not there, or is not whole.
    """
    unnamed = tempfile.TemporaryFile()  # noqa: SIM115 (write_manifest closes it)
    listing = run_in_subprocess(_list, settings, seed, _path(unnamed))
    _lists[repr((settings, seed))] = unnamed
    return listing


def write_manifest(out: Folder, settings: DataSettings, seed: int, storage: Folder) -> int:
    """Commit the source's images with their splits and hashed identifiers, once.  Returns how many there are.

    Raises:
        UserError: none of the files is an image, or there are too few patients.
    """
    if whole := out.read_json(COMPLETE):
        return whole["rows"]
    key = repr((settings, seed))
    if key not in _lists:
        list_and_hash(settings, seed)
    salt = identifiers.salt_of(storage)
    with _lists.pop(key) as unnamed:
        described_by_headers = hasattr(find_source(settings.source), "describe")
        if described_by_headers and (rows := run_in_subprocess(_list_headers, out, _path(unnamed))):
            read_headers(out, rows, settings, salt)
        return run_in_subprocess(_commit, out, settings, salt, _path(unnamed))


def _list(settings: DataSettings, seed: int, path: str) -> str:
    table = list_images(settings, seed)
    feather.write_feather(table, path, compression="uncompressed")
    return "-".join(filter(None, (listing_hash(table), description_hash(settings))))


def _list_headers(out: Folder, path: str) -> int:
    """Commit the rows of which only headers tell whose they are.  Returns how many there are."""
    listed = feather.read_table(path)
    return list_headers(out, listed.filter(pc.is_null(listed["patient_id"])))


def _commit(out: Folder, settings: DataSettings, salt: identifiers.Salt, path: str) -> int:
    listed = feather.read_table(path)
    images = identifiers.pseudonymise(listed.filter(pc.is_valid(listed["patient_id"])), salt)
    if images.num_rows < listed.num_rows:
        described = read_columns(out / HEADERS, HASHED_MANIFEST.names)
        check_described(described, settings)
        images = identifiers.unite(pa.concat_tables([images, described], promote_options="default"))
        images = draw_by_path_hash(images, settings.images)
    if not images.num_rows:
        raise UserError(f"data.root={settings.root!r}: none of its {listed.num_rows} files is an image of "
                        f"data={settings.source}")
    manifest = split.assign(images, settings)
    for index in range(shard_count(manifest.num_rows, settings.shard_rows)):
        write_shard(out, index, manifest.slice(index * settings.shard_rows, settings.shard_rows))
    out.write_json(COMPLETE, {"rows": manifest.num_rows})
    return manifest.num_rows


def _path(unnamed: IO[bytes]) -> str:
    """The path by which subprocesses open a file of this process that has no name."""
    return f"/proc/{os.getpid()}/fd/{unnamed.fileno()}"
