"""JSRT films and SCR masks: All247images/*.IMG, Clinical_Information/CLNDAT_EN.txt, scratch/fold*/masks/*/*.gif.

JPCLN films have one nodule, JPCNN films none. CLNDAT_EN.txt has a line per nodule film, with tabs and no header: file,
subtlety, size in mm, age, sex, x, y, malignant or benign, place, diagnosis (CNNDAT_EN.TXT: age and sex of the others).
Left and right are the patient's. Copies as PNG with labels.csv (image, patient, label) and masks/left_lung, … do too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.data.files import IMAGE_SUFFIXES
from pipelines.data.public_set import Card, ListedImage, ListedMask, PublicSet, Tree
from pipelines.data.settings import DataSettings

if TYPE_CHECKING:
    from pipelines.data.image.picture import GrayImage

CARD = Card(
    title="JSRT",
    images=247,
    where="http://db.jsrt.or.jp/eng.php (masks: https://www.isi.uu.nl/Research/Databases/SCR/)",
    licence="research and education only, no redistribution (JSRT, SCR)",
    citation="Shiraishi et al., AJR 174, 2000, doi:10.2214/ajr.174.1.1740071; masks: van Ginneken et al., Medical "
             "Image Analysis 10, 2006, doi:10.1016/j.media.2005.02.002",
    sign="registration with the JSRT",
    masks=("left_lung", "right_lung", "heart"),
    assesses=("Nodule",),
)
SIDE = 2048  # pixels of an .IMG film
FILM = re.compile(r"(JPC[LN]N\d{3})(\.\w+)", re.IGNORECASE)
KIND = re.compile(r"(JPCLN\d{3})\.IMG\b[^\r\n]*?\b(malignant|benign)\b")


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """All are PA, one of each patient. SCR's two folds are those of a cross-validation, and no split.

    A film of no nodule is not called normal, unless labels.csv does.
    """
    films: dict[str, str] = {}
    masks: dict[str, dict[str, str]] = {}
    for path in tree.files:
        *folders, name = path.split("/")
        match = FILM.fullmatch(name)
        structure = folders[-1].lower().replace(" ", "_") if folders else ""
        if match and structure in CARD.masks:
            masks.setdefault(match[1].upper(), {}).setdefault(structure, path)
        elif match and "masks" not in folders and match[2].lower() in (".img", *IMAGE_SUFFIXES):
            films.setdefault(match[1].upper(), path)
    labels = _labels(tree)
    for film, path in films.items():
        outlines = masks.get(film, {})
        stated = labels.get(film, ["nodule"] if film.startswith("JPCLN") else [])
        yield ListedImage(
            path=path,
            patient=film,
            view="PA",
            labels=stated,
            absent=[] if stated == ["nodule"] else ["malignant", "benign"],
            masks=tuple(ListedMask(name, outlines[name]) for name in CARD.masks if name in outlines),
        )


def _labels(tree: Tree) -> dict[str, list[str]]:
    if any(path.rsplit("/", 1)[-1] == "labels.csv" for path in tree.files):
        rows = [(tree.column(row, "image", "labels.csv"), tree.column(row, "label", "labels.csv"))
                for row in tree.table("labels.csv")]
        return {image.rsplit(".", 1)[0]: [] if label == "non-nodule" else [label] for image, label in rows}
    text = tree.folder.read(tree.find("CLNDAT_EN.txt", "CLNDAT_EN.TXT")).decode("latin-1")
    return {film: ["nodule", kind] for film, kind in KIND.findall(text)}


def read_film(content: bytes, settings: DataSettings) -> GrayImage:
    """The owner's format: 2048 x 2048 values of 12 bits without any head, big-endian, dark where the film is bright."""
    import numpy as np
    from PIL import Image

    from pipelines.data.image.decode import read_picture
    from pipelines.data.image.picture import GrayImage, check_size, to_8bit

    if len(content) != 2 * SIDE * SIDE:
        return read_picture(content, settings)
    check_size(SIDE, SIDE, settings)
    values = np.frombuffer(content, ">u2").reshape(SIDE, SIDE).astype(np.float32)
    return GrayImage(Image.fromarray(to_8bit(-values)), SIDE, SIDE, "percentile")


SOURCE = PublicSet(CARD, images, read_film)
