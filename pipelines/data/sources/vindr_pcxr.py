"""VinDr-PCXR (PediCXR), children below ten: train/IMAGE_ID.dicom, test/IMAGE_ID.dicom, image_labels_{train,test}.csv.

A row per image, read by one radiologist (rad_ID), with a column of 0 and 1 per disease, among them "No finding", in the
owner's spelling ("Brocho-pneumonia", "Diagphramatic hernia"). Patients and views are unknown.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.vindr_cxr import official

CARD = Card(
    title="VinDr-PCXR",
    images=9_125,
    where="https://physionet.org/content/vindr-pcxr/1.0.0/",
    licence="PhysioNet Restricted Health Data License 1.5.0",
    citation="Pham et al., PediCXR, Scientific Data 10:240, 2023, doi:10.1038/s41597-023-02102-5",
    sign="a PhysioNet account, and the data use agreement",
)


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Split by table, as the owner does."""
    return official(tree, view=None)


SOURCE = PublicSet(CARD, images)
