"""The embedded phantom thorax: any number of radiographs, with ground truth for every metric."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pipelines.settings import Data

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.decode import Decoded


def contents(settings: Data) -> None:
    """The settings say it all."""


def manifest(settings: Data, seed: int) -> pa.Table:
    """One row per image; `uri` is phantom://SEED/INDEX.  Raises ValueError without `data.images`."""
    import pyarrow as pa

    from pipelines.data.records import MANIFEST
    from pipelines.data.thorax import describe

    if settings.images is None:
        raise ValueError("data=phantom needs data.images=N")
    rows = []
    for index in range(settings.images):
        labels, patient, study = describe(seed, index)
        rows.append({"source": "phantom", "uri": f"phantom://{seed}/{index}", "path": f"{seed}/{index}", "view": "PA",
                     "patient_id": patient, "study_id": study, "labels": labels, "split": None})
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def load(uri: str, settings: Data) -> Decoded:
    from pipelines.data.decode import Decoded
    from pipelines.data.thorax import render

    seed, index = (int(part) for part in uri.removeprefix("phantom://").split("/"))
    image = render(seed, index, settings.size).image
    return Decoded(image, settings.size, settings.size, hashlib.sha256(image.tobytes()).hexdigest())
