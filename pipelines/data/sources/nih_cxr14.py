"""NIH ChestX-ray14: images_001 … images_012, Data_Entry_2017.csv and the official test list."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.findings import NIH, NO_FINDING
from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="NIH ChestX-ray14",
    images=112_120,
    where="https://nihcc.app.box.com/v/ChestXray-NIHCC",
    licence="free to use, with a link to the owner and the citation (NIH Clinical Center)",
    citation="Wang et al., ChestX-ray8, CVPR 2017, doi:10.1109/CVPR.2017.369",
    assesses=(*NIH, NO_FINDING),
)


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Findings are joined by `|`, or "No Finding" where there is none; of the 14 what is not listed is absent."""
    test = set(tree.folder.read(tree.find("test_list.txt")).decode().split())
    for row in tree.table("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"):
        name, findings, patient, follow_up, view = (
            tree.column(row, column, "Data_Entry_2017.csv")
            for column in ("Image Index", "Finding Labels", "Patient ID", "Follow-up #", "View Position"))
        yield ListedImage(
            path=tree.by_name.get(name, name),
            patient=patient,
            study=f"{patient}-{follow_up}",
            view=view,
            labels=findings.split("|"),
            split="test" if name in test else "train",
        )


SOURCE = PublicSet(CARD, images)
