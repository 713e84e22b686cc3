"""MIMIC-CXR 2.0.0 and 2.1.0: files/p10/p10000032/s50414267/DICOM_ID.dcm and cxr-record-list.csv, gzip or not.

It has neither labels nor views nor a split; MIMIC-CXR-JPG gives them out for the same images. Its tables
mimic-cxr-2.0.0-{metadata,chexpert,split}.csv are taken where they are anywhere below the root.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.mimic_cxr_jpg import VIEWS, findings, names, splits

CARD = Card(
    title="MIMIC-CXR",
    images=377_110,
    where="https://physionet.org/content/mimic-cxr/2.1.0/",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Johnson et al., MIMIC-CXR, Scientific Data 6:317, 2019, doi:10.1038/s41597-019-0322-0",
    sign="a credentialed PhysioNet account, CITI training in research with data, and the data use agreement",
)


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """One per row of cxr-record-list.csv."""
    found = findings(tree) if tree.has(*names("chexpert"), *names("negbio")) else {}
    split = splits(tree) if tree.has(*names("split")) else {}
    metadata = tree.table(*names("metadata")) if tree.has(*names("metadata")) else ()
    views = {tree.column(row, "dicom_id", names("metadata")[1]): tree.column(row, "ViewPosition", names("metadata")[1])
             for row in metadata}
    for row in tree.table("cxr-record-list.csv.gz", "cxr-record-list.csv"):
        patient, study, image, path = (tree.column(row, name, "cxr-record-list.csv")
                                       for name in ("subject_id", "study_id", "dicom_id", "path"))
        view = views.get(image, "")
        yield ListedImage(
            path=tree.by_name.get(f"{image}.dcm", path),
            patient=patient,
            study=study,
            view=VIEWS.get(view, view) or None,
            split=split.get(image),
            **found.get(study, {}),
        )


SOURCE = PublicSet(CARD, images)
