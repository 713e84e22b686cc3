"""The embedded phantom thorax: any number of radiographs, with ground truth for every metric."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import UserError
from pipelines.data.findings import finding_columns
from pipelines.data.settings import DataSettings
from pipelines.data.structures import STRUCTURES

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded


def manifest(settings: DataSettings, seed: int) -> pa.Table:
    """One row per image; `uri` is phantom://SEED/INDEX.  Raises UserError without `data.images`."""
    import pyarrow as pa

    from pipelines.data.phantom import LABELS, describe
    from pipelines.tables.schemas import MANIFEST

    if settings.images is None:
        raise UserError("data=phantom needs data.images=N")
    rows = []
    for index in range(settings.images):
        labels, patient, study = describe(seed, index)
        rows.append({"source": "phantom", "uri": f"phantom://{seed}/{index}", "path": f"{seed}/{index}", "view": "PA",
                     "patient_id": patient, "study_id": study, "split": None, "masks": [],
                     **finding_columns("phantom", labels, assessed=LABELS)})
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def load(row: Mapping[str, Any], settings: DataSettings) -> Decoded:
    from PIL import Image

    from pipelines.data.image.clean import perceptual_hash
    from pipelines.data.image.decode import Decoded
    from pipelines.data.phantom import render

    seed, index = (int(part) for part in row["uri"].removeprefix("phantom://").split("/"))
    film, size = render(seed, index, settings.size), settings.size
    sides = np.where(film.left, STRUCTURES["left_lung"], STRUCTURES["right_lung"])
    mask = np.where(film.heart, STRUCTURES["heart"], np.where(film.lungs, sides, 0)).astype(np.uint8)
    return Decoded(film.image, size, size, hashlib.sha256(film.image.tobytes()).hexdigest(), (0, 0, size, size),
                   perceptual_hash(Image.fromarray(film.image)), mask=mask,
                   structures=("left_lung", "right_lung", "heart"))
