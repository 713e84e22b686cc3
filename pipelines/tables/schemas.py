"""The Arrow schemas of the tables at rest, readable by Hugging Face `datasets` and by any Arrow tool."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

SPLITS = ("train", "val", "test")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the layout of datasets.Image

MASK = pa.struct([("name", pa.string()), ("path", pa.string()), ("rle", pa.string())])  # a file, or run lengths

MANIFEST = pa.schema([
    ("source", pa.string()),
    ("uri", pa.string()),
    ("path", pa.string()),  # relative to the source's root: what tells two images of equal content apart
    ("patient_id", pa.string()),  # null in a source's list: only the file's header tells
    ("people", pa.string()),  # the source whose name for the patient it is, where that is not this one
    ("study_id", pa.string()),
    ("view", pa.string()),
    ("labels", pa.list_(pa.string())),  # findings that are present; what is in none of these three is unknown
    ("absent", pa.list_(pa.string())),
    ("uncertain", pa.list_(pa.string())),  # mentioned, but neither stated nor denied: unknown, too
    ("split", pa.string()),
    ("masks", pa.list_(MASK)),
    ("inverted", pa.bool_()),  # only the source's tables tell that air is bright; null: no
    ("refused", pa.string()),  # the reason why an image is not wanted, where that is known without reading it
    ("bytes", pa.int64()),  # of its file and masks, where the listing tells
])
ONLY_LISTED = ("path", "people", "masks", "inverted", "refused", "bytes")  # what the images' table does not take over

HASHED_MANIFEST = pa.schema([
    *MANIFEST,
    ("bucket", pa.int16()),  # pipelines.data.split.split_bucket of the patient, computed before hashing
    ("alias", pa.string()),  # another identifier of the patient, hashed: of a list and a header one is `patient_id`
    ("entry", pa.int64()),  # number of the list's row for it; null: none
])
"""Listed images with hashed identifiers."""

QUARANTINE = pa.schema([
    ("uri", pa.string()),
    ("stage", pa.string()),
    ("reason", pa.string()),  # one of a short list, to count by
    ("detail", pa.string()),
])


def with_features(schema: pa.Schema) -> pa.Schema:
    """The schema with the metadata by which `datasets` decodes the columns named image and mask."""
    features = {field.name: {"_type": "Image"} if field.type == IMAGE else _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict:
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    return {"_type": "Value", "dtype": {"double": "float64", "float": "float32"}.get(str(kind), str(kind))}


IMAGES = with_features(pa.schema([
    ("image_id", pa.string()),
    ("image", IMAGE),
    ("mask", IMAGE),  # 0, or the number of a structure in pipelines.data.structures; null where none is outlined
    ("structures", pa.list_(pa.string())),  # that the mask outlines, also where they take up no pixel
    ("row", pa.int64()),  # of the manifest
    *(field for field in MANIFEST if field.name not in ONLY_LISTED),
    ("width", pa.int32()),  # pixels of the original
    ("height", pa.int32()),
    ("sha256", pa.string()),  # of the original file
    ("box", pa.list_(pa.int32())),  # left, top, right, bottom of what is shown, in pixels of the original
    ("mapping", pa.string()),  # how its values became 8 bits, as `image.picture.GrayImage` has it
    ("erased", pa.int32()),  # letters and marks replaced by their ground
    ("phash", pa.binary()),  # 256 bits, nearly the same for copies of one picture
]))

CORPUS = with_features(pa.schema([
    ("image_id", pa.string()),
    ("image", IMAGE),
    ("labels", pa.list_(pa.string())),  # findings that the condition states as present
    ("absent", pa.list_(pa.string())),  # and as absent
    ("strategy", pa.string()),
    ("source_image_ids", pa.list_(pa.string())),
    ("seed", pa.int64()),
    ("index", pa.int64()),
    ("guidance", pa.float64()),
    ("steps", pa.int32()),
    ("generator", pa.string()),  # fingerprint of the generator's training
]))


def latents_schema(latent: tuple[int, int, int], embedding: int, patches: int = 0, structures: Sequence[str] = (),
                   logvar: bool = True) -> pa.Schema:
    """Schema of one encoded image.

    Args:
        latent: Channels, height and width of the autoencoder's latent.
        embedding: Width of the encoder's global embedding.
        patches: Patch features of that width; the column is absent where there is none.
        structures: Channels of the mask (their names are in the column's metadata), each a share of the area in [0, 1],
            or -1 everywhere where the image does not outline it; the column is absent where there is none.
        logvar: Whether the width of the posteriors is kept.
    """
    tensor = pa.fixed_shape_tensor(pa.float16(), latent)
    return pa.schema([
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("latent_mean", tensor),
        *([("latent_logvar", tensor)] if logvar else []),
        ("embedding", pa.fixed_shape_tensor(pa.float16(), (embedding,))),
        *([("patches", pa.fixed_shape_tensor(pa.float16(), (patches, embedding)))] if patches else []),
        *([pa.field("mask", pa.fixed_shape_tensor(pa.float16(), (len(structures), *latent[1:])),
                    metadata={"structures": json.dumps(list(structures))})] if structures else []),
        ("patient_id", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("absent", pa.list_(pa.string())),
        ("split", pa.string()),
    ])
