"""RSNA Pneumonia Detection Challenge (Kaggle, stage 2): stage_2_{train,test}_images/PATIENT_ID.dcm.

stage_2_detailed_class_info.csv has the class of each train image (a row per box, so that rows repeat); Target in
stage_2_train_labels.csv is 1 where it is "Lung Opacity". A patientId is an image of NIH ChestX-ray14, and a person may
have several: the RSNA's own pneumonia-challenge-dataset-mappings_2018.json, where it is there, tells the person.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from cluster.errors import UserError
from pipelines.data.findings import NO_FINDING
from pipelines.data.public_set import TRAIN_ONLY, Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="RSNA Pneumonia Detection Challenge",
    images=29_684,
    where="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
    licence="the competition's rules: non-commercial, for research and education",
    citation="Shih et al., Radiology: Artificial Intelligence 1(1), 2019, doi:10.1148/ryai.2019180041",
    sign="a Kaggle account, and the competition's rules",
    assesses=("Lung Opacity", NO_FINDING),
)
CLASSES = {"Lung Opacity": ["Lung Opacity"], "No Lung Opacity / Not Normal": [], "Normal": [NO_FINDING]}
TABLE = "stage_2_detailed_class_info.csv"
NIH = "pneumonia-challenge-dataset-mappings_2018.json"


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Images of the test part have no labels."""
    persons = {entry["subset_img_id"]: str(int(entry["img_id"].split("_")[0]))
               for entry in (json.loads(tree.folder.read(tree.find(NIH))) if tree.has(NIH) else ())}
    classes = {tree.column(row, "patientId", TABLE): tree.column(row, "class", TABLE) for row in tree.table(TABLE)}
    for image, label in classes.items():
        path = tree.by_name.get(f"{image}.dcm", f"stage_2_train_images/{image}.dcm")
        if label not in CLASSES:
            raise UserError(f"{tree.root}: {TABLE} has the class {label!r}; known are {', '.join(CLASSES)}")
        patient, people = _person(image, persons)
        yield ListedImage(path, patient, people=people, labels=CLASSES[label], split="train")
    for path in tree.pictures:
        image = path.rpartition("/")[2].removesuffix(".dcm")
        if "/stage_2_test_images/" in f"/{path}" and image not in classes:
            patient, people = _person(image, persons)
            yield ListedImage(path, patient, people=people, labelled=False, split=TRAIN_ONLY)


def _person(image: str, persons: Mapping[str, str]) -> tuple[str, str | None]:
    """Whose image it is: NIH's number of the person, where the table has it, and that it is NIH's."""
    return (persons[image], "nih_cxr14") if image in persons else (image, None)


SOURCE = PublicSet(CARD, images)
