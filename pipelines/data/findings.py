"""One vocabulary of findings for all sets, and the three states of a finding: present, absent, unknown.

Findings have CheXpert's names, else NIH ChestX-ray14's, else those of the set that adds them. A set's own term is
mapped to the finding that contains it ("laminar atelectasis" is Atelectasis). What no rule maps keeps its own spelling.

A finding of an image is present or absent where its set says so, and otherwise unknown. A set whose readers assessed
every image for a list of findings denies what they did not mark. The text-mined labels of CheXpert, MIMIC-CXR and BRAX
are blank where a report does not mention a finding, and -1 where it is uncertain: both are unknown (for -1 U-Ignore,
Irvin et al. 2019, doi:10.1609/aaai.v33i01.3301590), and "No Finding" denies the others but Support Devices, all as in
TorchXRayVision (Cohen et al. 2022, arXiv:2111.00595).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NO_FINDING = "No Finding"

FINDINGS: dict[str, tuple[str, ...]] = {
    # CheXpert
    NO_FINDING: ("normal", "no findings", "healthy"),
    "Enlarged Cardiomediastinum": ("mediastinal enlargement", "superior mediastinal enlargement"),
    "Cardiomegaly": (),
    "Lung Opacity": ("opacity", "airspace opacity"),
    "Lung Lesion": ("nodule/mass",),
    "Edema": ("pulmonary edema", "oedema"),
    "Consolidation": ("air bronchogram",),
    "Pneumonia": ("atypical pneumonia",),
    "Atelectasis": ("laminar atelectasis", "lobar atelectasis", "segmental atelectasis", "total atelectasis",
                    "round atelectasis", "atelectasis basal"),
    "Pneumothorax": ("hydropneumothorax",),
    "Pleural Effusion": ("effusion", "loculated pleural effusion", "loculated fissural effusion", "hydropneumothorax",
                         "empyema", "hemothorax"),
    "Pleural Other": (),
    "Fracture": ("rib fracture", "callus rib fracture", "clavicle fracture", "humeral fracture", "vertebral fracture"),
    "Support Devices": ("pacemaker", "dual chamber device", "single chamber device", "dai", "electrical device",
                        "endotracheal tube", "tracheostomy tube", "NSG tube", "chest drain tube",
                        "central venous catheter", "central venous catheter via jugular vein",
                        "central venous catheter via subclavian vein", "reservoir central venous catheter"),
    # NIH ChestX-ray14
    "Infiltration": ("infiltrates", "interstitial pattern", "ground glass pattern", "alveolar pattern",
                     "reticular interstitial pattern", "reticulonodular interstitial pattern"),
    "Mass": ("pulmonary mass",),
    "Nodule": ("multiple nodules",),
    "Emphysema": (),
    "Fibrosis": ("pulmonary fibrosis",),
    "Pleural Thickening": ("apical pleural thickening", "calcified pleural thickening"),
    "Hernia": (),
    # COVIDx, BIMCV, Kermany, Montgomery, Shenzhen, JSRT
    "COVID-19": ("covid19", "covid"),
    "Bacterial Pneumonia": (),
    "Viral Pneumonia": (),
    "Tuberculosis": (),
    "Malignant Nodule": (),
    "Benign Nodule": (),
    # VinDr-CXR, VinDr-PCXR, PadChest
    "Aortic Enlargement": (),
    "Calcification": ("calcified densities",),
    "COPD": ("copd signs",),
    "Interstitial Lung Disease": ("ild",),
    "Lung Cavity": ("cavitation",),
    "Lung Cyst": (),
    "Lung Tumor": (),
    "Mediastinal Shift": (),
    "Mediastinal Tumor": (),
    "Pulmonary Artery Enlargement": ("enlarged pa",),
    "Other Lesion": (),
    "Other Disease": ("other diseases",),
    "Bronchitis": (),
    "Bronchiolitis": (),
    "Bronchopneumonia": ("broncho-pneumonia", "brocho-pneumonia"),
    "Pleuropneumonia": ("pleuro-pneumonia",),
    "Situs Inversus": (),
    "Diaphragmatic Hernia": ("diagphramatic hernia",),
    "Hiatal Hernia": (),
    "Congenital Emphysema": (),
    "Congenital Pulmonary Airway Malformation": ("cpam",),
    "Hyaline Membrane Disease": (),
    # Kvasir-SEG, HyperKvasir
    "Polyp": (),
}
"""Every finding, and the other spellings of it; case, `_` and `-` do not count."""

SPELLINGS = {
    "covidx_cxr4": {"positive": "COVID-19"},
    "kermany": {"bacteria": "Bacterial Pneumonia", "virus": "Viral Pneumonia"},
    "jsrt": {"malignant": "Malignant Nodule", "benign": "Benign Nodule"},
    "medmnist": {"pleural": "Pleural Thickening"},
}
"""Words that name a finding in one source only."""

OWN = {
    "padchest": "the other terms of its tree of 174 findings, and remarks on the study",
    "bimcv_covid19": "as PadChest's",
    "medmnist": "classes of its sets that show no chest",
    "folder": "the user's own classes",
    "manifest": "the user's own labels",
    "huggingface": "the data set's own labels",
}
"""Sources whose labels may be in no line of FINDINGS, and what such labels are; they keep their spelling."""

CHEXPERT = tuple(FINDINGS)[:14]
NIH = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion", "Emphysema", "Fibrosis", "Hernia",
       "Infiltration", "Mass", "Nodule", "Pleural Thickening", "Pneumonia", "Pneumothorax")
NO_PATHOLOGY = (NO_FINDING, "Support Devices")


def spelling_key(label: str) -> str:
    """Equal for spellings that differ in case, blanks, `_` and `-` alone."""
    return re.sub(r"[\s_-]+", " ", label).strip().casefold()


_GENERAL: dict[str, tuple[str, ...]] = {}
for _finding, _others in FINDINGS.items():
    for _spelling in (_finding, *_others):
        _GENERAL[spelling_key(_spelling)] = (*_GENERAL.get(spelling_key(_spelling), ()), _finding)


def canonical(label: str, source: str) -> tuple[str, ...]:
    """The findings that a source's label names (of hydropneumothorax two); its own text where it names none."""
    own = SPELLINGS.get(source, {}).get(spelling_key(label))
    return (own,) if own else _GENERAL.get(spelling_key(label), (label.strip(),))


def nearest(label: str) -> str | None:
    """The finding that has a spelling like the label's, None where there is none."""
    close = difflib.get_close_matches(spelling_key(label), _GENERAL, 1, 0.75)
    return _GENERAL[close[0]][0] if close else None


def finding_columns(source: str, present: Iterable[str], uncertain: Iterable[str] = (), absent: Iterable[str] = (),
           assessed: Iterable[str] = ()) -> dict[str, list[str]]:
    """The columns `labels` (present), `absent` and `uncertain` of an image; no finding is in two of them.

    Args:
        source: Whose spellings these are.
        present, uncertain, absent: As the source states them. Where they overlap, present counts before uncertain, and
            uncertain before absent. A pathology denies "No Finding".
        assessed: What the image was read for: absent where it is neither present nor uncertain.
    """
    def named(labels: Iterable[str]) -> dict[str, None]:
        return {finding: None for label in labels for finding in canonical(label, source)}

    stated = named(present)
    pathological = any(finding in FINDINGS and finding not in NO_PATHOLOGY for finding in stated)
    doubtful = [finding for finding in named(uncertain) if finding not in stated]
    denied = named((*absent, *assessed, *([NO_FINDING] if pathological else [])))
    return {"labels": list(stated), "uncertain": doubtful,
            "absent": [finding for finding in denied if finding not in stated and finding not in doubtful]}
