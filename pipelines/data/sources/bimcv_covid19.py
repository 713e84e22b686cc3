"""BIMCV-COVID19+ and -: covid19_{posi,neg}/sub-S…/ses-E…/mod-rx/sub-S…_ses-E…_run-1_bp-chest_vp-{ap,pa,ll}_cr.png.

Findings are in derivatives/labels/labels*.tsv (another name at each iteration), a row per session, as the text of a
Python list; "COVID 19 uncertain" is the finding "COVID 19", uncertain. Some persons are in both partitions, under two
names: listjoin_ok.tsv, which comes with the negative one, tells who. mod-ct folders (CT) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.data.files import connect
from pipelines.data.image.picture import Refused
from pipelines.data.public_set import Card, ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.padchest import CARD as PADCHEST
from pipelines.data.sources.padchest import is_reading, listed

if TYPE_CHECKING:
    from pipelines.data.image.decode import Decoded

CARD = Card(
    title="BIMCV-COVID19",
    images=56_171,
    where="https://bimcv.cipf.es/bimcv-projects/bimcv-covid19/",
    licence="BIMCV-COVID19 Dataset Research Use Agreement (research only)",
    citation="de la Iglesia Vayá et al., BIMCV COVID-19+, arXiv:2006.01174",
    sign="BIMCV's research use agreement",
    assesses=PADCHEST.assesses,
)
NAME = re.compile(r"(sub-[^_/]+)_(ses-[^_/]+)(?:[^/]*_vp-([^_.]+))?[^/]*\.png$")
LABELS = re.compile(r"(^|/)labels[^/]*\.tsv$", re.IGNORECASE)
SAME = "listjoin_ok.tsv"
VIEWS = {"ap": "AP", "pa": "PA", "ll": "LATERAL", "rl": "LATERAL", "lateral": "LATERAL"}
DOUBT = " uncertain"
PHOTOMETRIC = "00280004"  # photometric interpretation


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """The view is what the name says (vp-…), None where it says nothing."""
    labels = _labels(tree)
    same = {tree.column(row, "covid19_neg", SAME): tree.column(row, "covid19_posi", SAME)
            for row in (tree.table(SAME, delimiter="\t") if tree.has(SAME) else ())}
    for path in tree.pictures:
        if "/mod-rx/" not in f"/{path}" or not (match := NAME.search(path)):
            continue
        patient, session, view = match.groups()
        negative = "covid19_neg" in f"{tree.root}/{path}"
        found = labels.get(session, [])
        yield ListedImage(
            path=path,
            patient=same.get(patient, patient) if negative else patient,
            study=session,
            view=VIEWS.get(view, view),
            labels=[label for label in found if not label.endswith(DOUBT)],
            uncertain=[label.removesuffix(DOUBT) for label in found if label.endswith(DOUBT)],
            labelled=is_reading(found),
        )


def _labels(tree: Tree) -> dict[str, list[str]]:
    tables = [path for path in tree.files if LABELS.search(path)]
    if not tables:
        raise tree.missing("derivatives/labels/labels*.tsv")
    return {tree.column(row, "ReportID", table): listed(tree.column(row, "Labels", table))
            for table in tables for row in tree.table(table, delimiter="\t")}


class Bimcv(PublicSet):
    """Some films are stored inverted, which only the JSON beside each tells, in DICOM's JSON model."""

    def load(self, row: Mapping[str, Any], settings: DataSettings, **options: Any) -> Decoded:
        folder, _, name = row["uri"].rpartition("/")
        beside = f"{name.removesuffix('.png')}.json"
        try:
            header = connect(folder).read_json(beside) or {}
            inverted = "MONOCHROME1" in header.get(PHOTOMETRIC, {}).get("Value", [])
        except (RuntimeError, ValueError, AttributeError) as error:
            raise Refused("not_an_image", "the JSON file that tells its polarity cannot be read") from error
        return super().load(row, settings, inverted=inverted, **options)


SOURCE = Bimcv(CARD, images)
