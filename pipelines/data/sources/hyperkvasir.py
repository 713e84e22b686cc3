"""The segmented part of HyperKvasir: segmented-images/images/*.jpg and segmented-images/masks/*.jpg of the same names.

They are the polyps of Kvasir-SEG: take one of the two sets. data.root may be the whole of HyperKvasir, of which
labeled-images and unlabeled-images are left out, or segmented-images itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.kvasir_seg import polyps

CARD = Card(
    title="HyperKvasir segmented images",
    images=1_000,
    where="https://datasets.simula.no/hyper-kvasir/ (also https://osf.io/mh9sj)",
    licence="CC BY 4.0",
    citation="Borgli et al., HyperKvasir, Scientific Data 7:283, 2020, doi:10.1038/s41597-020-00622-y",
    masks=("polyp",),
    assesses=("Polyp",),
)


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Patients are unknown; there is no official split of this part."""
    return (image for image in polyps(tree)
            if image.path.startswith("images/") or "/segmented-images/images/" in f"/{image.path}")


SOURCE = PublicSet(CARD, images)
