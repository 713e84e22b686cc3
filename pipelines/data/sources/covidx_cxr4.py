"""COVIDx CXR-4, as Kaggle hands it out: train.txt, val.txt and test.txt beside the folders train, val and test.

A line is `patient_id filename class source`, with single spaces between and no header. The class is positive or
negative (COVID-19); the source is the earlier set that an image was taken from, which also named the patient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.errors import UserError
from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="COVIDx CXR-4",
    images=84_818,
    where="https://www.kaggle.com/datasets/andyczhao/covidx-cxr2",
    licence="research only; each image is under the terms of the set that it was taken from",
    citation="Wu et al., COVIDx CXR-4, 2023, arXiv:2311.17677",
    sign="a Kaggle account",
    assesses=("COVID-19",),
)
SPLITS = ("train", "val", "test")
PEOPLE = {"bimcv": "bimcv_covid19", "rsna": "rsna_pneumonia"}
"""Earlier sets, as the lists call them, that are read here, too."""
LINE = re.compile(r"(\S+)\s+(.+?)\s+(positive|negative)(\s+\S+)?")


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Only the lists of folders that hold files are read, so that one split alone will do."""
    found = tree.find(*(f"{split}.txt" for split in SPLITS))
    base = found[: found.rfind("/") + 1]
    for split in SPLITS:
        if not any(path.startswith(f"{base}{split}/") for path in tree.files):
            continue
        table = tree.find(f"{base}{split}.txt")
        for number, line in enumerate(tree.folder.read(table).decode().splitlines(), 1):
            if not line.strip() or (number == 1 and line.split()[1:2] == ["filename"]):
                continue
            if not (match := LINE.fullmatch(line.strip())):
                raise UserError(f"{tree.root}/{table}, line {number}: {line!r} is not `patient_id filename class "
                                 "source` with the class positive or negative")
            patient, name, finding, origin = match.groups()
            labels = ["positive"] if finding == "positive" else []  # negative: any film without COVID-19, normal or not
            yield ListedImage(path=f"{base}{split}/{name}", patient=patient, labels=labels, split=split,
                        people=PEOPLE.get((origin or "").strip().lower()))


SOURCE = PublicSet(CARD, images)
