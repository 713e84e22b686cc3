"""Shenzhen Hospital X-ray set: ChinaSet_AllFiles/CXR_png/CHNCXR_N_L.png, L being 0 for normal and 1 for tuberculosis.

ClinicalReadings/*.txt adds sex, age and the reading in words, and is not read. 566 films have one mask for both lungs,
CHNCXR_N_L_mask.png, in a folder mask or masks (Kaggle: yoctoman/shcxr-lung-mask), wherever below the root.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.findings import NO_FINDING
from pipelines.data.public_set import Card, ListedImage, ListedMask, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources import montgomery

CARD = Card(
    title="Shenzhen Hospital X-ray set",
    images=662,
    where="https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/Shenzhen-Hospital-CXR-Set/",
    licence="free to use, with the citation and thanks to the owners (U.S. National Library of Medicine); masks: "
            "CC BY-NC-SA 4.0",
    citation=f"{montgomery.CARD.citation}; masks: Stirenko et al., 2018, arXiv:1803.01199",
    masks=("lungs",),
    assesses=("Tuberculosis", NO_FINDING),
)


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """All are PA, one of each patient."""
    masks = {path.rsplit("/", 1)[-1]: path for path in tree.pictures
             if path.endswith("_mask.png") and path.split("/")[-2:-1] in (["mask"], ["masks"])}
    for path, patient, label in montgomery.radiographs(tree, "CHNCXR"):
        mask = masks.get(path.rsplit("/", 1)[-1].replace(".png", "_mask.png"))
        yield ListedImage(path=path, patient=patient, view="PA", labels=[label],
                    masks=(ListedMask("lungs", mask),) if mask else ())


SOURCE = PublicSet(CARD, images)
