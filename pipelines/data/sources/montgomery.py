"""Montgomery County X-ray set: MontgomerySet/CXR_png/MCUCXR_N_L.png, ManualMask/{leftMask,rightMask}/ alike.

L is 0 for a normal film and 1 for tuberculosis; ClinicalReadings/*.txt adds sex, age and the reading in words, and is
not read. Kaggle's copy together with Shenzhen has one mask for both lungs in masks/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.data.findings import NO_FINDING
from pipelines.data.public_set import Card, ListedImage, ListedMask, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="Montgomery County X-ray set",
    images=138,
    where="https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/Montgomery-County-CXR-Set/",
    licence="free to use, with the citation and thanks to the owners (U.S. National Library of Medicine)",
    citation="Jaeger et al., Two public chest X-ray datasets for computer-aided screening of pulmonary diseases, "
             "Quant Imaging Med Surg 4, 2014, doi:10.3978/j.issn.2223-4292.2014.11.20",
    masks=("left_lung", "right_lung", "lungs"),
    assesses=("Tuberculosis", NO_FINDING),
)
LABELS = {"0": "normal", "1": "tuberculosis"}


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """All are PA, one of each patient."""
    for path, patient, label in radiographs(tree, "MCUCXR"):
        base, name = re.sub(r"(CXR_png/)?[^/]*$", "", path), path.rsplit("/", 1)[-1]
        places = {"left_lung": f"{base}ManualMask/leftMask/{name}", "right_lung": f"{base}ManualMask/rightMask/{name}",
                  "lungs": f"{base}masks/{name}"}
        masks = tuple(ListedMask(structure, place) for structure, place in places.items() if place in tree.files)
        masks = masks[:2] if len(masks) > 2 else masks  # both sides tell more than one mask of both lungs
        yield ListedImage(path=path, patient=patient, view="PA", labels=[label], masks=masks)


def radiographs(tree: Tree, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Path, patient and label of each film that is called PREFIX_N_L.png and lies in CXR_png (or in the root)."""
    film = re.compile(rf"(?:(?:.*/)?CXR_png/)?(({prefix}_\d+)_([01])\.png)")
    seen = set()
    for path in tree.pictures:
        if (match := film.fullmatch(path)) and match[1] not in seen:
            seen.add(match[1])
            yield path, match[2], LABELS[match[3]]


SOURCE = PublicSet(CARD, images)
