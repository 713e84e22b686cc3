"""BRAX 1.0.0 and 1.1.0: one table, whose PngPath and DicomPath name each image in images/ and in Anonymized_DICOMs/.

master_spreadsheet_update.csv (master_spreadsheet.csv at first) has the findings of CheXpert as columns: 1 (stated), 0
(denied), -1 (uncertain) or blank. An image that is there as PNG and as DICOM is taken once, as PNG. No official split.
"""

from __future__ import annotations

from collections.abc import Iterator
from posixpath import dirname, join

from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.chexpert import stated

CARD = Card(
    title="BRAX",
    images=40_967,
    where="https://physionet.org/content/brax/1.1.0/",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Reis et al., BRAX, Scientific Data 9:487, 2022, doi:10.1038/s41597-022-01608-8",
    sign="a credentialed PhysioNet account, CITI training in research with data, and the data use agreement",
)
TABLES = ("master_spreadsheet_update.csv", "master_spreadsheet.csv")
VIEWS = {"LL": "LATERAL", "RL": "LATERAL", "L": "LATERAL"}


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """The study is AccessionNumber; the view is ViewPosition, with left and right lateral as LATERAL."""
    folder = dirname(tree.find(*TABLES))
    for row in tree.table(*TABLES):
        png, dicom, patient, study, view = (
            tree.column(row, name, TABLES[0])
            for name in ("PngPath", "DicomPath", "PatientID", "AccessionNumber", "ViewPosition"))
        paths = [join(folder, path) for path in (png, dicom)]
        yield ListedImage(
            path=next((path for path in paths if path in tree.files), paths[0]),
            patient=patient,
            study=study,
            view=VIEWS.get(view, view) or None,
            **stated(tree, row, TABLES[0]),
        )


SOURCE = PublicSet(CARD, images)
