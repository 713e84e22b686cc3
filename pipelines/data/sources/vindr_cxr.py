"""VinDr-CXR: train/IMAGE_ID.dicom and test/IMAGE_ID.dicom, PA views only, one per patient as far as is told.

PhysioNet's annotations/image_labels_train.csv has a row per image and reader (three each), image_labels_test.csv a row
per image (consensus of five), with a column of 0 and 1 per finding (train: "Other diseases", test: "Other disease").
Kaggle's train.csv (VinBigData) has a row per image, reader and box with its class_name; its test images have no labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from pipelines.data.public_set import TRAIN_ONLY, Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="VinDr-CXR",
    images=18_000,
    where="https://physionet.org/content/vindr-cxr/1.0.0/",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Nguyen et al., VinDr-CXR, Scientific Data 9:429, 2022, doi:10.1038/s41597-022-01498-w",
    sign="a credentialed PhysioNet account, CITI training in research with data, and the data use agreement",
)
TABLES = ("image_labels_train.csv", "image_labels_test.csv")
KAGGLE = "train.csv"
KEYS = {"", "image_id", "rad_id", "rad_ID"}


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """What most readers of an image state is present, what half of them do uncertain, and all else absent."""
    if tree.has(*TABLES):
        yield from official(tree, view="PA")
    elif tree.has(KAGGLE):
        yield from _kaggle(tree)
    else:
        raise tree.missing(f"{' or '.join(TABLES)} (PhysioNet) or {KAGGLE} (Kaggle)")


def official(tree: Tree, view: str | None) -> Iterator[ListedImage]:
    """Images of the tables image_labels_{train,test}.csv, or of that which is there."""
    if not tree.has(*TABLES):
        raise tree.missing(" or ".join(TABLES))
    for table, split in zip(TABLES, ("train", "test"), strict=True):
        rows = list(tree.table(table)) if tree.has(table) else []
        read_for = [name for name in (rows[0] if rows else ()) if name not in KEYS]
        readings = ((tree.column(row, "image_id", table), [name for name in read_for if row[name] in ("1", "1.0")])
                    for row in rows)
        yield from _agreed(tree, readings, read_for, split, view)


def _agreed(tree: Tree, readings: Iterable[tuple[str, Iterable[str]]], read_for: Iterable[str], split: str,
            view: str | None) -> Iterator[ListedImage]:
    """One image of all its readings, each an image's id and those findings of `read_for` that one reader states."""
    found: dict[str, list[Iterable[str]]] = {}
    for image, findings in readings:
        found.setdefault(image, []).append(findings)
    for image, readers in found.items():
        votes = Counter(chain.from_iterable(readers))
        yield ListedImage(
            path=tree.by_name.get(f"{image}.dicom", f"{split}/{image}.dicom"),
            view=view,
            labels=[finding for finding, count in votes.items() if 2 * count > len(readers)],
            absent=[finding for finding in read_for if 2 * votes[finding] < len(readers)],
            uncertain=[finding for finding, count in votes.items() if 2 * count == len(readers)],
            split=split,
        )


def _kaggle(tree: Tree) -> Iterator[ListedImage]:
    """Images of the test part have no labels."""
    readers: dict[tuple[str, str], dict[str, None]] = {}
    for row in tree.table(KAGGLE):
        image, reader, name = (tree.column(row, column, KAGGLE) for column in ("image_id", "rad_id", "class_name"))
        readers.setdefault((image, reader), {})[name] = None
    read_for = sorted(set(chain.from_iterable(readers.values())))
    yield from _agreed(tree, ((image, found) for (image, _), found in readers.items()), read_for, "train", "PA")
    labelled = {image for image, _ in readers}
    for path in tree.pictures:
        if "/test/" in f"/{path}" and path.rpartition("/")[2].removesuffix(".dicom") not in labelled:
            yield ListedImage(path, view="PA", labelled=False, split=TRAIN_ONLY)


SOURCE = PublicSet(CARD, images)
