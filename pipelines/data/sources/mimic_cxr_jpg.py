"""MIMIC-CXR-JPG 2.0.0 and 2.1.0: files/p10/p10000032/s50414267/DICOM_ID.jpg and tables, gzip or not.

mimic-cxr-2.0.0-metadata has a row per image, -split its official split, -chexpert (else -negbio) a row per study: 1.0
(stated), 0.0 (denied), -1.0 (uncertain) or blank (not mentioned).
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.public_set import Card, Findings, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.chexpert import stated

CARD = Card(
    title="MIMIC-CXR-JPG",
    images=377_110,
    where="https://physionet.org/content/mimic-cxr-jpg/2.1.0/",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Johnson et al., MIMIC-CXR-JPG, arXiv:1901.07042; PhysioNet, doi:10.13026/jsn5-t979",
    sign="a credentialed PhysioNet account, CITI training in research with data, and the data use agreement",
)
SPLITS = {"train": "train", "validate": "val", "test": "test"}
VIEWS = {"LL": "LATERAL", "RL": "LATERAL"}


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """The view is ViewPosition, with left and right lateral as LATERAL."""
    found, split = findings(tree), splits(tree)
    for row in tree.table(*names("metadata")):
        image, patient, study, view = (tree.column(row, name, "mimic-cxr-2.0.0-metadata.csv")
                                       for name in ("dicom_id", "subject_id", "study_id", "ViewPosition"))
        yield ListedImage(
            path=tree.by_name.get(f"{image}.jpg", f"files/p{patient[:2]}/p{patient}/s{study}/{image}.jpg"),
            patient=patient,
            people="mimic_cxr",
            study=study,
            view=VIEWS.get(view, view) or None,
            split=split.get(image),
            **found.get(study, {}),
        )


def names(kind: str) -> tuple[str, str]:
    return f"mimic-cxr-2.0.0-{kind}.csv.gz", f"mimic-cxr-2.0.0-{kind}.csv"


def findings(tree: Tree) -> dict[str, Findings]:
    """What is stated, denied and uncertain, by study."""
    table = "mimic-cxr-2.0.0-chexpert.csv"
    return {tree.column(row, "study_id", table): stated(tree, row, table)
            for row in tree.table(*names("chexpert"), *names("negbio"))}


def splits(tree: Tree) -> dict[str, str | None]:
    """The official split by image."""
    table = "mimic-cxr-2.0.0-split.csv"
    return {tree.column(row, "dicom_id", table): SPLITS.get(tree.column(row, "split", table))
            for row in tree.table(*names("split"))}


SOURCE = PublicSet(CARD, images)
