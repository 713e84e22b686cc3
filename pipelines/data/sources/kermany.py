"""Paediatric chest X-rays of Kermany et al.: [chest_xray/]{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg.

Files are called personN_bacteria_M, personN_virus_M, IM-N-M and NORMAL2-IM-N-M (Mendeley's version 2, and Kaggle's
copy, which adds val and holds everything twice), or BACTERIA-N-M, VIRUS-N-M and NORMAL-N-M with N the patient (version
3). Person N of bacteria and person N of virus are not known to be one child, and count as two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.data.findings import NO_FINDING
from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="Kermany chest X-rays",
    images=5_856,
    where="https://data.mendeley.com/datasets/rscbjbr9sj (Kaggle: paultimothymooney/chest-xray-pneumonia)",
    licence="CC BY 4.0",
    citation="Kermany et al., Identifying Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning, "
             "Cell 172, 2018, doi:10.1016/j.cell.2018.02.010; data doi:10.17632/rscbjbr9sj",
    assesses=("Pneumonia", "Bacterial Pneumonia", "Viral Pneumonia", NO_FINDING),
)
PATIENT = re.compile(r"(person\d+_(?:bacteria|virus))_|((?:NORMAL2-)?IM-\d+)-|(?:BACTERIA|VIRUS|NORMAL)-(\d+)-")
CAUSE = re.compile(r"bacteria|virus")


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """All are AP. The second label of pneumonia is its cause; bacteria and virus are uncertain where it is not told."""
    seen = set()
    for path in tree.pictures:
        split, finding, name = place = ("", "", *path.split("/"))[-3:]
        if finding not in ("NORMAL", "PNEUMONIA") or place in seen:
            continue
        seen.add(place)
        patient = PATIENT.match(name)
        cause = CAUSE.findall(name.lower())[:1] if finding == "PNEUMONIA" else []
        yield ListedImage(
            path=path,
            patient=patient and next(filter(None, patient.groups())),
            view="AP",
            labels=[finding, *cause],
            uncertain=["bacteria", "virus"] if finding == "PNEUMONIA" and not cause else [],
            split=split if split in ("train", "val", "test") else None,
        )


SOURCE = PublicSet(CARD, images)
