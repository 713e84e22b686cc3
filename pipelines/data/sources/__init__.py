"""Public data sets and local folders, one module each, found by name (`data.source`).

A source is a module, or the `SOURCE` of one, with two functions:

- `manifest(settings, seed) -> pyarrow.Table`: one row per image (`schemas.MANIFEST`), `split` null where the source
  has none, `patient_id` as the source names it; no image is read. A change of any row but of `uri` is a change of the
  data: ingest is then stale;
- `load(row, settings) -> Decoded`: the image of a row of the manifest, or `picture.Refused`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from cluster.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded
    from pipelines.data.settings import Data


class Source(Protocol):
    def manifest(self, settings: Data, seed: int) -> pa.Table: ...
    def load(self, row: Mapping[str, Any], settings: Data) -> Decoded: ...


@functools.cache
def find_source(name: str) -> Source:
    """The source called `name`.  Raises UserError naming those there are."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        raise UserError(f"data.source={name!r} is not known; there are: {', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(Source, getattr(module, "SOURCE", module))
