"""Findings have one name in all sets and one of three states; what no set states is unknown."""

import importlib
import pkgutil

import pyarrow as pa
import pytest

from cluster.storage import Folder
from pipelines.data import sources
from pipelines.data.findings import CHEXPERT, FINDINGS, NIH, NO_FINDING, OWN, SPELLINGS, canonical, finding_columns
from pipelines.data.labels import label_lines, label_report, present
from pipelines.data.phantom import LABELS as PHANTOM
from pipelines.data.public_set import ListedImage, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources import chexpert, kermany, medmnist, montgomery, nih_cxr14, rsna_pneumonia
from pipelines.data.structures import STRUCTURES
from pipelines.tables.parquet import write_shard
from pipelines.tables.schemas import MANIFEST

VINDR = ("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation",
         "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst",
         "Mediastinal shift", "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax",
         "Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis",
         "Other disease", "Other diseases", "No finding")
PEDIATRIC = ("No finding", "Bronchitis", "Brocho-pneumonia", "Other disease", "Bronchiolitis", "Situs inversus",
             "Pneumonia", "Pleuro-pneumonia", "Diagphramatic hernia", "Tuberculosis", "Congenital emphysema", "CPAM",
             "Hyaline membrane disease", "Mediastinal tumor", "Lung tumor")
NIH_SPELLINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
                 "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax", "No Finding")
EMITTED = {
    "nih_cxr14": NIH_SPELLINGS, "chexpert": CHEXPERT, "mimic_cxr": CHEXPERT, "mimic_cxr_jpg": CHEXPERT,
    "brax": CHEXPERT, "vindr_cxr": VINDR, "vindr_pcxr": PEDIATRIC, "siim_acr": ("Pneumothorax",),
    "rsna_pneumonia": [label for labels in rsna_pneumonia.CLASSES.values() for label in labels],
    "covidx_cxr4": ("positive",),
    "kermany": ("NORMAL", "PNEUMONIA", "bacteria", "virus"), "jsrt": ("nodule", "malignant", "benign", "normal"),
    "montgomery": montgomery.LABELS.values(), "shenzhen": montgomery.LABELS.values(), "kvasir_seg": ("polyp",),
    "hyperkvasir": ("polyp",), "phantom": PHANTOM, "dicom": (), "cxr_868k": (), "mix": (),
}
MODULES = sorted(module.name for module in pkgutil.iter_modules(sources.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_every_label_that_a_source_can_emit_is_a_finding_or_its_own(name):
    assert (name in EMITTED) != (name in OWN), "a source's labels are listed here, or open"
    for label in EMITTED.get(name, ()):
        assert set(canonical(label, name)) <= set(FINDINGS), label
    card = getattr(importlib.import_module(f"pipelines.data.sources.{name}"), "CARD", None)
    assert set(getattr(card, "assesses", ())) <= set(FINDINGS)
    assert set(getattr(card, "masks", ())) <= set(STRUCTURES)


def test_a_spelling_is_of_one_finding_unless_it_is_of_two_by_design():
    spelled = [(spelling, canonical(spelling, "")) for finding, others in FINDINGS.items()
               for spelling in (finding, *others)]
    assert {spelling for spelling, findings in spelled if len(findings) > 1} == {"hydropneumothorax"}
    assert {finding for names in SPELLINGS.values() for finding in names.values()} <= set(FINDINGS)
    assert set(NIH) | set(CHEXPERT) <= set(FINDINGS)


@pytest.mark.parametrize("spelling", ["normal", "NORMAL", "Normal", "No Finding", "No finding", "no_finding"])
def test_normal_has_one_name(spelling):
    assert canonical(spelling, "folder") == (NO_FINDING,)


def test_chest_sets_of_medmnist_have_findings_and_others_keep_their_classes():
    assert {name for label in medmnist.LABELS["chestmnist"] for name in canonical(label, "medmnist")} == set(NIH)
    assert canonical("smooth muscle", "medmnist") == ("smooth muscle",)


@pytest.mark.parametrize(("told", "expected"), [
    ({"present": ["Effusion"], "assessed": NIH}, (["Pleural Effusion"], [*NIH[:4], *NIH[5:], NO_FINDING], [])),
    ({"present": ["normal"], "uncertain": ["Edema"], "assessed": ["Edema", "Mass"]},
     ([NO_FINDING], ["Mass"], ["Edema"])),
    ({"present": ["Edema"], "uncertain": ["Edema"], "absent": ["edema"]}, (["Edema"], [NO_FINDING], [])),
    ({"present": ["Support Devices"]}, (["Support Devices"], [], [])),
    ({"present": ["my own"]}, (["my own"], [], [])),
    ({"present": []}, ([], [], [])),
])
def test_states_of_an_image(told, expected):
    found = finding_columns("folder", **told)
    assert (found["labels"], found["absent"], found["uncertain"]) == expected


def rows_of(module, listed: list[ListedImage], tmp_path) -> list[dict]:
    """Rows of the manifest of these images, in their order."""
    for image in listed:
        (tmp_path / image.path).write_bytes(b"x")
    source = PublicSet(module.CARD, lambda tree, settings: listed)
    source.name = module.SOURCE.name
    return source.manifest(DataSettings(source="", root=str(tmp_path)), 0).to_pylist()


def test_nih_denies_what_it_does_not_list(tmp_path):
    [row] = rows_of(nih_cxr14, [ListedImage("a.png", labels=["Mass", "Pleural_Thickening"])], tmp_path)
    assert row["labels"] == ["Mass", "Pleural Thickening"]
    assert set(row["absent"]) == {*NIH, NO_FINDING} - set(row["labels"])


def test_chexpert_tells_denied_from_uncertain_and_from_not_mentioned():
    tree = Tree("/nowhere", chexpert.CARD)
    row = dict.fromkeys(CHEXPERT, "") | {"Edema": "1.0", "Fracture": "0.0", "Pneumonia": "-1.0"}
    assert chexpert.stated(tree, row, "t") == {"labels": ["Edema"], "absent": ["Fracture"], "uncertain": ["Pneumonia"]}
    healthy = chexpert.stated(tree, dict.fromkeys(CHEXPERT, "") | {NO_FINDING: "1.0", "Lung Lesion": "-1.0"}, "t")
    assert healthy["labels"] == [NO_FINDING]
    assert healthy["uncertain"] == ["Lung Lesion"]
    assert set(healthy["absent"]) == set(CHEXPERT) - {NO_FINDING, "Lung Lesion", "Support Devices"}


def test_an_unlabelled_image_is_not_healthy(tmp_path):
    [row] = rows_of(rsna_pneumonia, [ListedImage("a.dcm", labelled=False)], tmp_path)
    assert (row["labels"], row["absent"], row["uncertain"]) == ([], [], [])


def test_a_cause_that_is_not_told_is_uncertain(tmp_path):
    for name in ("train/PNEUMONIA/person1_virus_6.jpeg", "train/PNEUMONIA/0001.jpeg", "train/NORMAL/IM-1-1.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows = kermany.SOURCE.manifest(DataSettings(source="kermany", root=str(tmp_path)), 0).to_pylist()
    assert [(row["labels"], sorted(row["absent"]), row["uncertain"]) for row in rows] == [
        ([NO_FINDING], ["Bacterial Pneumonia", "Pneumonia", "Viral Pneumonia"], []),
        (["Pneumonia"], [NO_FINDING], ["Bacterial Pneumonia", "Viral Pneumonia"]),
        (["Pneumonia", "Viral Pneumonia"], ["Bacterial Pneumonia", NO_FINDING], [])]


def test_the_label_report_counts_the_states_of_each_source(tmp_path):
    folder = Folder(str(tmp_path))
    rows = [("a", ["Edema"], ["Mass"]), ("a", [], []), ("a", ["Edema", "own"], []), ("b", ["Mass"], ["Edema"])]
    for shard in range(2):
        write_shard(folder, shard, pa.Table.from_pylist(
            [{"source": source, "labels": found, "absent": absent} for source, found, absent in rows[shard * 2:][:2]],
            schema=MANIFEST))
    report = label_report(folder)
    assert report == {
        "a": {"images": 3, "findings": {"Edema": {"present": 2, "absent": 0, "unknown": 1},
                                        "Mass": {"present": 0, "absent": 1, "unknown": 2},
                                        "own": {"present": 1, "absent": 0, "unknown": 2}}},
        "b": {"images": 1, "findings": {"Edema": {"present": 0, "absent": 1, "unknown": 0},
                                        "Mass": {"present": 1, "absent": 0, "unknown": 0}}}}
    assert present(report) == {"Edema": 2, "own": 1, "Mass": 1}
    assert any("Mass" in line for line in label_lines(report))
