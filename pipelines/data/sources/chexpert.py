"""CheXpert: train, valid and test folders of patientN/studyN/viewN_{frontal,lateral}, and a table for each folder.

Given out as CheXpert-v1.0 (whole or in four "batch" folders), as CheXpert-v1.0-small, as CheXpert Plus (PNG or DICOM,
one table, labels as JSON lines) and, with the test set, as CheXlocalize. No patient is in two folders, so that patient,
study and view name an image in all of these. A finding is 1 (stated), 0 (denied), -1 (uncertain) or blank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipelines.data.findings import CHEXPERT, NO_FINDING, NO_PATHOLOGY
from pipelines.data.public_set import Card, Findings, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings

CARD = Card(
    title="CheXpert",
    images=224_316,
    where="https://aimi.stanford.edu/datasets/chexpert-chest-x-rays",
    licence="Stanford University Dataset Research Use Agreement (non-commercial research)",
    citation="Irvin et al., CheXpert, AAAI 2019, doi:10.1609/aaai.v33i01.3301590; "
             "for CheXpert Plus also Chambon et al., arXiv:2405.19538",
    sign="registration, and Stanford's Research Use Agreement",
)
STATED, DENIED, UNCERTAIN = {"1", "1.0", 1}, {"0", "0.0", 0}, {"-1", "-1.0", -1}
TABLES = {"train.csv": "train", "valid.csv": "val", "val_labels.csv": "val", "test_labels.csv": "test"}
PLUS, PLUS_LABELS = "df_chexpert_plus_240401.csv", ("impression_fixed.json", "report_fixed.json")
PLUS_SPLITS = {"train": "train", "valid": "val", "test": "test"}


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Labels of v1.0 are preferred to those of CheXpert Plus, where both are there."""
    paths = {_key(path): path for path in tree.pictures}
    rows = _plus(tree) if tree.has(PLUS) and not tree.has(*TABLES) else _tables(tree)
    for key, (path, split, projection, findings) in {_key(row[0]): row for row in rows}.items():
        patient, study, name = key.split("/")
        view = "LATERAL" if "lateral" in name else projection or "Frontal"
        yield ListedImage(paths.get(key, path), patient, f"{patient}/{study}", view, split=split, **findings)


def stated(tree: Tree, row: dict[str, Any], table: str) -> Findings:
    """What a row that has the 14 findings as columns states; "No Finding" denies the blank ones but Support Devices."""
    cells = {finding: tree.column(row, finding, table) for finding in CHEXPERT}
    healthy = cells[NO_FINDING] in STATED
    return {"labels": [finding for finding, cell in cells.items() if cell in STATED],
            "absent": [finding for finding, cell in cells.items()
                       if cell in DENIED or (healthy and cell in ("", None) and finding not in NO_PATHOLOGY)],
            "uncertain": [finding for finding, cell in cells.items() if cell in UNCERTAIN]}


def _tables(tree: Tree) -> Iterator[tuple]:
    if not tree.has(*TABLES):
        raise tree.missing(f"{' or '.join(TABLES)} (or {PLUS})")
    for table, split in TABLES.items():
        for row in tree.table(table) if tree.has(table) else ():
            projection = "" if table.endswith("_labels.csv") else tree.column(row, "AP/PA", table)
            yield tree.column(row, "Path", table), split, projection, stated(tree, row, table)


def _plus(tree: Tree) -> Iterator[tuple]:
    table = tree.find(*PLUS_LABELS)
    labels = {tree.column(cells, "path_to_image", table): stated(tree, cells, table)
              for cells in map(json.loads, tree.folder.read(table).splitlines())}
    for row in tree.table(PLUS):
        path, split, projection = (tree.column(row, name, PLUS) for name in ("path_to_image", "split", "ap_pa"))
        yield path, PLUS_SPLITS.get(split), projection, labels.get(path, {})


def _key(path: str) -> str:
    return "/".join(path.split("/")[-3:]).rpartition(".")[0]


SOURCE = PublicSet(CARD, images)
