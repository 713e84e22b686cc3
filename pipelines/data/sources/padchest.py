"""PadChest: 16-bit PNG in folders 0 … 50 and 54 (ImageDir), one table with a row per image; and PadChest-GR.

Labels are the text of a Python list, with stray blanks; "normal", "exclude", "suboptimal study" and "unchanged" are
among them. PadChest-GR has 4,555 of the images, a master_table.csv with a row per image and label (what is there, or
"Normal"), and an official split; where both tables are there, its labels and split go before PadChest's.

The PNG files hold the DICOM's stored values: where PhotometricInterpretation_DICOM is MONOCHROME1, air is bright.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.data.findings import NO_FINDING
from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="PadChest",
    images=160_868,
    where="https://bimcv.cipf.es/bimcv-projects/padchest/ (PadChest-GR: …/padchest-gr/)",
    licence="PADCHEST Dataset Research Use Agreement (research only)",
    citation="Bustos et al., PadChest, Medical Image Analysis 66, 2020, doi:10.1016/j.media.2020.101797; "
             "for PadChest-GR also de Castro et al., arXiv:2411.05085",
    sign="BIMCV's research use agreement",
    assesses=("Cardiomegaly", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
              "Fracture", "Infiltration", "Mass", "Nodule", "Emphysema", "Fibrosis", "Pleural Thickening",
              "Tuberculosis", "Hiatal Hernia", "COPD", "Support Devices", NO_FINDING),
)
NO_READING = {"unchanged", "exclude", "suboptimal study"}  # a report that says no more leaves the findings open

TABLES = ("PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",
          "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", "PADCHEST_chest_x_ray_images_labels_160K.csv")
GROUNDED = "master_table.csv"
GROUNDED_SPLITS = {"train": "train", "validation": "val", "test": "test"}
VIEWS = {"L": "LATERAL", "UNK": None}


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """The view is Projection (PA, AP, L, AP_horizontal, COSTAL, EXCLUDE), with L as LATERAL; PadChest-GR is frontal."""
    grounded = _grounded(tree)
    if grounded and not tree.has(*TABLES):
        yield from grounded.values()
        return
    for row in tree.table(*TABLES):
        name, folder, patient, study, projection, labels = (
            tree.column(row, column, TABLES[0])
            for column in ("ImageID", "ImageDir", "PatientID", "StudyID", "Projection", "Labels"))
        known = grounded.get(name)
        yield ListedImage(
            path=tree.by_name.get(name, f"{folder}/{name}"),
            patient=patient,
            study=study,
            view=VIEWS.get(projection, projection) or None,
            labels=known.labels if known else listed(labels),
            labelled=known.labelled if known else is_reading(listed(labels)),
            split=known.split if known else None,
            inverted=row.get("PhotometricInterpretation_DICOM", "").strip() == "MONOCHROME1",
        )


def listed(text: str) -> list[str]:
    """The labels of a Python list's text, each once."""
    return list(dict.fromkeys(label for part in re.split(r"[,\t]", text.strip("[] ")) if (label := part.strip(" '\""))))


def is_reading(labels: list[str]) -> bool:
    """Whether what is not among an image's labels is absent."""
    return bool(labels) and NO_READING.isdisjoint(labels)


def _grounded(tree: Tree) -> dict[str, ListedImage]:
    """The images of PadChest-GR by name."""
    rows: dict[str, list[dict[str, str]]] = {}
    for row in tree.table(GROUNDED) if tree.has(GROUNDED) else ():
        rows.setdefault(tree.column(row, "ImageID", GROUNDED), []).append(row)
    return {
        name: ListedImage(
            path=tree.by_name.get(name, name),
            patient=tree.column(found[0], "PatientID", GROUNDED),
            study=tree.column(found[0], "StudyID", GROUNDED),
            labels=list(dict.fromkeys(filter(None, (tree.column(row, "label", GROUNDED).strip() for row in found)))),
            labelled=any(tree.column(row, "label", GROUNDED).strip() for row in found),
            split=GROUNDED_SPLITS.get(tree.column(found[0], "split", GROUNDED)),
        )
        for name, found in rows.items()
    }


SOURCE = PublicSet(CARD, images)
