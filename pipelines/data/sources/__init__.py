"""Public data sets and local folders, one module each, found by name (`data.source`).

Packages elsewhere add sources by an entry point of the group `rayograph.sources`: NAME = MODULE, or MODULE:OBJECT.

A source is a module, or the `SOURCE` of one, with two functions:

- `manifest(settings, seed) -> pyarrow.Table`: one row per image (`schemas.MANIFEST`), `split` null where the source
  has none, `patient_id` as the source names it; no image is read. A change of any row but of `uri` is a change of the
  data: ingest is then stale;
- `load(row, settings) -> Decoded`: the image of a row of the manifest, or `picture.Refused`;

and, where it has them:

- `describe(row, settings) -> row or None`, of rows listed without a `patient_id`, since only the file tells (DICOM
  headers): the row with what the file says, None where it is no image; run by workers, shard by shard. It may add an
  `alias`, another identifier of the patient, where a list and the header have one each, and `entry`, the number of the
  list's row;
- `description_hash(settings) -> str`, where `describe` takes what it says from elsewhere than the file: a hash of that,
  a change of which makes ingest stale, too;
- `check_described(rows, settings)`, of all rows that `describe` gave: says what is odd about them together, and raises
  UserError where none can be right;
- `image_folder(root) -> str`, where data.root is a file that lists the images: the folder that their paths are
  relative to, and `raw_folder(root) -> str`: the folder that they are known to lie in, else `root`: results may not
  lie there;
- `card`, or `cards(settings)` by the name in the column `source`: whose the set is, and under which terms.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from cluster.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded
    from pipelines.data.public_set import Card
    from pipelines.data.settings import DataSettings


GROUP = "rayograph.sources"


class Source(Protocol):
    def manifest(self, settings: DataSettings, seed: int) -> pa.Table: ...
    def load(self, row: Mapping[str, Any], settings: DataSettings) -> Decoded: ...


@functools.cache
def find_source(name: str) -> Source:
    """The source called `name`, with `-` or `_`.  Raises UserError naming those there are."""
    name, added = source_name(name), _added()
    found = added[name].load() if name in added else importlib.import_module(f"{__name__}.{name}")
    return cast(Source, getattr(found, "SOURCE", found))


def source_name(name: str) -> str:
    """The name of a source as its module or entry point has it.  Raises UserError naming those there are."""
    known = {*(module.name for module in pkgutil.iter_modules(__path__)), *_added()}
    for spelled in (name, name.replace("-", "_")):
        if spelled in known:
            return spelled
    raise UserError(f"data.source={name!r} is not known; there are: {', '.join(sorted(known))}")


def _added() -> dict[str, importlib.metadata.EntryPoint]:
    """Sources of other packages."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def image_folder(settings: DataSettings) -> str | None:
    """The folder that the images' paths are relative to; None where there is none."""
    source: Any = find_source(settings.source)
    return source.image_folder(settings.root) if settings.root and hasattr(source, "image_folder") else settings.root


def raw_folder(source: str, root: str) -> str:
    """The folder that the images of a source's root lie in, and no results may."""
    found: Any = find_source(source)
    return found.raw_folder(root) if hasattr(found, "raw_folder") else root


def description_hash(settings: DataSettings) -> str:
    """A hash of what the source says of files beside its manifest and their headers; "" where that is nothing."""
    source: Any = find_source(settings.source)
    return source.description_hash(settings) if hasattr(source, "description_hash") else ""


def check_described(described: pa.Table, settings: DataSettings) -> None:
    """What the source says of all rows that it described.  Raises UserError where none of them can be right."""
    source: Any = find_source(settings.source)
    if hasattr(source, "check_described"):
        source.check_described(described, settings)


def cards_of(settings: DataSettings) -> dict[str, Card]:
    """Whose the images are, by the name in the column `source`; {} where the source does not tell."""
    source: Any = find_source(settings.source)
    if hasattr(source, "cards"):
        return source.cards(settings)
    return {source_name(settings.source): source.card} if hasattr(source, "card") else {}
