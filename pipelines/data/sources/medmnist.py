"""The 2-D sets of MedMNIST: data.subset=pneumoniamnist, or pneumoniamnist_128 to fix the size (28, 64, 128, 224).

The owner's files are SUBSET.npz (28 pixels) and SUBSET_SIZE.npz, each with {train,val,test}_{images,labels}: uint8
(N, size, size) or (N, size, size, 3), and (N, 1) numbers of classes, or (N, 14) zeros and ones in chestmnist. Without a
fixed size the smallest is taken that is not below data.size. They lie in data.root, or are put there (~/.medmnist by
default) by the package.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.faults import with_retries
from cluster.storage import Folder
from pipelines.data.files import manifest_table
from pipelines.data.findings import finding_columns
from pipelines.data.public_set import Card
from pipelines.data.settings import DataSettings
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded

CARD = Card(
    title="MedMNIST",
    images=707_962,
    where="https://zenodo.org/records/10519652 (https://medmnist.com)",
    licence="CC BY 4.0; dermamnist CC BY-NC 4.0",
    citation="Yang et al., MedMNIST v2, Scientific Data 10:41, 2023, doi:10.1038/s41597-022-01721-8",
)
SIZES = (28, 64, 128, 224)
SPLITS = ("train", "val", "test")
_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left",
           "lung-right", "pancreas", "spleen")
LABELS = {
    "pathmnist": ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
                  "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    "chestmnist": ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia",
                   "pneumothorax", "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
    "dermamnist": ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma",
                   "benign keratosis-like lesions", "dermatofibroma", "melanoma", "melanocytic nevi",
                   "vascular lesions"),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("0", "1", "2", "3", "4"),
    "breastmnist": ("malignant", "normal, benign"),
    "bloodmnist": ("basophil", "eosinophil", "erythroblast",
                   "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte",
                   "neutrophil", "platelet"),
    "tissuemnist": ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
                    "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
                    "Thick Ascending Limb"),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}


class MedMNIST:
    name, card = "medmnist", CARD

    def manifest(self, settings: DataSettings, seed: int) -> pa.Table:
        """One row per image; `uri` is medmnist://SUBSET/SIZE/SPLIT/INDEX.

        Raises:
            UserError: no such subset, or its file is neither there nor can be had, or is none of MedMNIST's.
        """
        return manifest_table(self.rows(settings))

    def rows(self, settings: DataSettings) -> Iterator[dict[str, Any]]:
        """Rows of the manifest.  Patients are unknown."""
        subset, size = _find(settings)
        size_in_bytes = _root(settings).size(_file(subset, size))
        for split in SPLITS:
            labels = _labels(_root(settings), _file(subset, size), f"{split}_labels")
            for index, values in enumerate(labels.reshape(len(labels), -1).tolist()):
                classes = [k for k, one in enumerate(values) if one] if subset == "chestmnist" else values
                place = f"{split}/{index}"
                yield {"source": "medmnist", "uri": f"medmnist://{subset}/{size}/{place}", "path": place,
                       "patient_id": place, "study_id": None, "view": None, "split": split, "masks": [],
                       "bytes": size_in_bytes,
                       **finding_columns("medmnist", [LABELS[subset][int(k)] for k in classes],
                                         assessed=LABELS[subset])}

    def load(self, row: Mapping[str, Any], settings: DataSettings) -> Decoded:
        from PIL import Image

        from pipelines.data.image.decode import decode

        subset, size, split, index = row["uri"].removeprefix("medmnist://").split("/")
        root, name, member = _root(settings).uri, _file(subset, int(size)), f"{split}_images"
        pixels = with_retries(lambda: _images(root, name, member), f"{root}/{name}")[int(index)]
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "BMP")
        return decode(content.getvalue(), settings, view=row["view"])


def _root(settings: DataSettings) -> Folder:
    return Folder(settings.root or "~/.medmnist")


def _file(subset: str, size: int) -> str:
    return f"{subset}.npz" if size == 28 else f"{subset}_{size}.npz"


def _find(settings: DataSettings) -> tuple[str, int]:
    """The subset, and the size to take of those that are there; downloaded where none will do."""
    match = re.fullmatch(rf"({'|'.join(LABELS)})(?:_({'|'.join(map(str, SIZES))}))?", settings.subset or "")
    if not match:
        raise UserError(f"data.subset={settings.subset!r}: data=medmnist needs one of {', '.join(LABELS)} (and _28, "
                         "_64, _128 or _224 behind it to fix the size)")
    subset, fixed = match[1], match[2]
    enough = [int(fixed)] if fixed else [size for size in SIZES if size >= settings.size] or [SIZES[-1]]
    smaller = [size for size in reversed(SIZES) if size < enough[0]] if settings.root and not fixed else []
    there = _root(settings).names(".npz")
    for size in (*enough, *smaller):
        if _file(subset, size) in there:
            if size in smaller:
                say(f"{_root(settings).uri} holds {subset} of {size} pixels only, fewer than data.size={settings.size}")
            return subset, size
    _download(subset, enough[0], _root(settings))
    return subset, enough[0]


def _download(subset: str, size: int, root: Folder) -> None:
    """By the package, which checks the owner's MD5."""
    missing = f"{root.uri} holds no {_file(subset, size)} of {CARD.title}, which is given out at {CARD.where}"
    if not root.is_local:
        raise UserError(f"{missing}; copy it there")
    try:
        import medmnist
    except ImportError as error:
        raise UserError(f"{missing}; put it there, or `pip install medmnist` to have it downloaded") from error
    os.makedirs(root.uri, exist_ok=True)
    try:
        getattr(medmnist, medmnist.INFO[subset]["python_class"])("val", download=True, root=root.uri, size=size)
    except RuntimeError as error:
        raise UserError(f"{missing}; its download failed: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _member(root: Folder, name: str, member: str) -> Iterator[tuple[Any, zipfile.ZipInfo]]:
    """One array's file inside an .npz, open to read.  Raises UserError when there is none."""
    from pyarrow import ArrowInvalid

    try:
        with (root.filesystem.open_input_file(f"{root.path}/{name}") as file,
              zipfile.ZipFile(io.BufferedReader(file, 1 << 20)) as archive,
              archive.open(f"{member}.npy") as stream):
            yield stream, archive.getinfo(f"{member}.npy")
    except (zipfile.BadZipFile, zlib.error, KeyError, ArrowInvalid) as error:
        raise UserError(f"{root.uri}/{name} is no file of MedMNIST: {error}") from error


def _labels(root: Folder, name: str, member: str) -> np.ndarray:
    from numpy.lib import format

    with _member(root, name, member) as (stream, _):
        return format.read_array(stream, allow_pickle=False)


@lru_cache(maxsize=8)
def _images(root: str, name: str, member: str) -> np.ndarray:
    """All images of a split, unpacked once per machine and mapped into memory: some take 13 GB."""
    import numpy as np
    from filelock import FileLock

    scratch = Path(tempfile.gettempdir()) / f"rayograph-{os.getuid()}"
    scratch.mkdir(mode=0o700, exist_ok=True)
    with _member(Folder(root), name, member) as (stream, info):
        target = scratch / f"{name.removesuffix('.npz')}-{member}-{info.CRC:08x}.npy"
        with FileLock(f"{target}.lock"):
            if not target.exists():
                with open(f"{target}.tmp", "wb") as file:
                    while block := stream.read(1 << 22):
                        file.write(block)
                os.replace(f"{target}.tmp", target)
    return np.load(target, mmap_mode="r", allow_pickle=False)


SOURCE = MedMNIST()
