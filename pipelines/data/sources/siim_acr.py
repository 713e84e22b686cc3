"""SIIM-ACR Pneumothorax Segmentation (Kaggle): dicom-images-{train,test}/STUDY/SERIES/ID.dcm, stage_2_images/ID.dcm.

train-rle.csv (columns ImageId and " EncodedPixels", with that blank) has a row per mask of a train image, -1 for none;
stage_2_train.csv, where it is there, has those of dicom-images-test too. Run lengths go down the columns of the picture
(1024 x 1024), and each start counts from the end of the run before. Several masks of an image are parts of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.data.public_set import TRAIN_ONLY, Card, ListedImage, ListedMask, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="SIIM-ACR Pneumothorax Segmentation",
    images=15_252,
    where="https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation",
    licence="the competition's rules: non-commercial, for research and education",
    citation="Zawacki et al., SIIM-ACR Pneumothorax Segmentation, Kaggle, 2019",
    sign="a Kaggle account, and the competition's rules",
    masks=("pneumothorax",),
    assesses=("Pneumothorax",),
)
LABEL = "Pneumothorax"


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Each study counts as a person, as patients are unknown. An image in no table has no label; one with no run has an
    empty mask."""
    table = "stage_2_train.csv" if tree.has("stage_2_train.csv") else "train-rle.csv"
    runs: dict[str, list[str]] = {}
    for row in tree.table(table):
        cells = {name.strip(): cell.strip() for name, cell in row.items()}
        image, encoded = tree.column(cells, "ImageId", table), tree.column(cells, "EncodedPixels", table)
        runs.setdefault(image, []).extend([encoded] if encoded != "-1" else [])
    for path in tree.pictures:
        *folders, name = path.split("/")
        image, suffix = name[:-4], name[-4:]
        study = next(filter(re.compile(r"[0-9.]+").fullmatch, folders[-2:-1]), None)
        if suffix == ".dcm" and image in runs:
            yield ListedImage(path, study, study, labels=[LABEL] if runs[image] else [],
                        split="test" if "dicom-images-test" in folders else "train",
                        masks=tuple(ListedMask("pneumothorax", rle=encoded) for encoded in runs[image] or [""]))
        elif suffix == ".dcm":
            yield ListedImage(path, study, study, labelled=False, split=TRAIN_ONLY)


SOURCE = PublicSet(CARD, images)
