"""Hospital sets: small trees laid out as their owners do, with the owners' tables, columns and ways of writing."""

import csv
import gzip
import importlib
import io
import json

import pytest

from pipelines.data.findings import CHEXPERT, finding_columns
from pipelines.data.public_set import TRAIN_ONLY, ListedMask, Tree
from pipelines.data.settings import DataSettings

NAMES = ("chexpert", "mimic_cxr_jpg", "mimic_cxr", "padchest", "bimcv_covid19", "vindr_cxr", "vindr_pcxr", "brax",
         "rsna_pneumonia", "siim_acr")
FINDINGS = CHEXPERT


@pytest.fixture
def put(tmp_path):
    """Writes images (of two bytes each) and tables (text by path; gzip where the name says so)."""

    def write(*paths, **tables):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(b"xx")
        for path, text in tables.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            content = text.encode()
            (tmp_path / path).write_bytes(gzip.compress(content) if path.endswith(".gz") else content)

    return write


@pytest.fixture
def read(tmp_path):
    """Images of a source by path; the manifest has those of them that are there."""

    def images(name, below="."):
        module = importlib.import_module(f"pipelines.data.sources.{name}")
        settings = DataSettings(source=name, root=str(tmp_path / below))
        found = list(module.images(Tree(settings.root, module.CARD), settings))
        assert len({image.path for image in found}) == len(found), "an image is told once"
        assert [(row["path"], row["patient_id"], row["study_id"], row["view"], row["labels"], row["split"])
                for row in module.SOURCE.manifest(settings, 0).to_pylist()] == sorted(
            (image.path, image.patient or image.path, image.study, image.view,
             finding_columns(name, image.labels)["labels"], image.split)
            for image in found if (tmp_path / below / image.path).exists())
        return {image.path: image for image in found}

    return images


def table(*rows, delimiter=","):
    """Text of a table of dicts; what a row has not is blank."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def findings(**stated):
    """The 14 columns of CheXpert, blank but for those given (with _ for a blank in the name)."""
    return dict.fromkeys(FINDINGS, "") | {name.replace("_", " "): value for name, value in stated.items()}


def told(image):
    return image.patient, image.study, image.view, list(image.labels), list(image.uncertain), image.split


# CheXpert


def chexpert_row(path, projection="", **stated):
    side = "Lateral" if "lateral" in path else "Frontal"
    return {"Path": path, "Sex": "Female", "Age": 68, "Frontal/Lateral": side, "AP/PA": projection} | findings(**stated)


@pytest.mark.parametrize("release", ["CheXpert-v1.0", "CheXpert-v1.0-small"])
@pytest.mark.parametrize("below", [".", "release"])
def test_chexpert_train_and_valid(put, read, release, below):
    base = "" if below != "." else f"{release}/"
    put(*(f"{'release/' if below != '.' else base}{path}" for path in (
        "train/patient00001/study1/view1_frontal.jpg", "train/patient00001/study2/view1_frontal.jpg",
        "train/patient00001/study2/view2_lateral.jpg", "valid/patient64541/study1/view1_frontal.jpg")))
    put(**{
        f"{'release/' if below != '.' else base}train.csv": table(
            chexpert_row(f"{release}/train/patient00001/study1/view1_frontal.jpg", "AP", No_Finding="1.0",
                         Pneumothorax="0.0", Support_Devices="1.0"),
            chexpert_row(f"{release}/train/patient00001/study2/view1_frontal.jpg", "PA", Edema="-1.0",
                         Lung_Opacity="1.0"),
            chexpert_row(f"{release}/train/patient00001/study2/view2_lateral.jpg", "", Edema="-1.0"),
            chexpert_row(f"{release}/train/patient00009/study1/view1_frontal.jpg", "AP")),
        f"{'release/' if below != '.' else base}valid.csv": table(
            chexpert_row(f"{release}/valid/patient64541/study1/view1_frontal.jpg", "AP",
                         **{name.replace(" ", "_"): "0.0" for name in FINDINGS} | {"Cardiomegaly": "1.0"})),
    })
    found = read("chexpert", below)
    assert told(found[f"{base}train/patient00001/study1/view1_frontal.jpg"]) == (
        "patient00001", "patient00001/study1", "AP", ["No Finding", "Support Devices"], [], "train")
    assert told(found[f"{base}train/patient00001/study2/view1_frontal.jpg"]) == (
        "patient00001", "patient00001/study2", "PA", ["Lung Opacity"], ["Edema"], "train")
    assert told(found[f"{base}train/patient00001/study2/view2_lateral.jpg"]) == (
        "patient00001", "patient00001/study2", "LATERAL", [], ["Edema"], "train")
    assert told(found[f"{base}valid/patient64541/study1/view1_frontal.jpg"]) == (
        "patient64541", "patient64541/study1", "AP", ["Cardiomegaly"], [], "val")
    assert len(found) == 5, "an image that is not here yet keeps the table's path"


def test_chexpert_in_batch_folders_and_with_the_test_set_of_chexlocalize(put, read):
    put("CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg",
        "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient64541/study1/view1_frontal.jpg",
        "CheXpert/test/patient64741/study1/view1_frontal.jpg", "CheXpert/test/patient64741/study1/view2_lateral.jpg")
    labels = findings() | dict.fromkeys(FINDINGS, "0") | {"Edema": "1"}
    put(**{
        "CheXpert-v1.0 batch 1 (validate & csv)/train.csv": table(
            chexpert_row("CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg", "PA", Fracture="1.0")),
        "CheXpert-v1.0 batch 1 (validate & csv)/valid.csv": table(
            chexpert_row("CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg", "AP")),
        "CheXpert/test_labels.csv": table(
            {"Path": "test/patient64741/study1/view1_frontal.jpg", **labels},
            {"Path": "test/patient64741/study1/view2_lateral.jpg", **labels}),
    })
    found = read("chexpert")
    assert {path: (image.view, image.split, image.labels) for path, image in found.items()} == {
        "CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg": ("PA", "train", ["Fracture"]),
        "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient64541/study1/view1_frontal.jpg": ("AP", "val", []),
        "CheXpert/test/patient64741/study1/view1_frontal.jpg": ("Frontal", "test", ["Edema"]),
        "CheXpert/test/patient64741/study1/view2_lateral.jpg": ("LATERAL", "test", ["Edema"]),
    }


@pytest.mark.parametrize(("folder", "suffix"), [("PNG", "png"), ("DICOM/Uncompressed", "dcm")])
def test_chexpert_plus(put, read, folder, suffix):
    paths = ["train/patient42142/study5/view1_frontal", "valid/patient64541/study1/view2_lateral"]
    put(*(f"{folder}/{path}.{suffix}" for path in paths))
    rows = [{"path_to_image": f"{path}.jpg", "path_to_dcm": f"{path}.dcm", "frontal_lateral": side, "ap_pa": projection,
             "deid_patient_id": path.split("/")[1], "report": "two\nlines, and a comma", "split": path.split("/")[0]}
            for path, side, projection in zip(paths, ("Frontal", "Lateral"), ("AP", ""), strict=True)]
    lines = [{"path_to_image": f"{path}.jpg", **dict.fromkeys(FINDINGS), **stated} for path, stated in zip(
        paths, ({"Cardiomegaly": 1.0, "Edema": -1.0, "Fracture": 0.0}, {"No Finding": 1.0}), strict=True)]
    put(**{"df_chexpert_plus_240401.csv": table(*rows),
           "chexbert_labels/impression_fixed.json": "\n".join(map(json.dumps, lines)) + "\n"})
    found = read("chexpert")
    assert {path: told(image) for path, image in found.items()} == {
        f"{folder}/{paths[0]}.{suffix}": (
            "patient42142", "patient42142/study5", "AP", ["Cardiomegaly"], ["Edema"], "train"),
        f"{folder}/{paths[1]}.{suffix}": (
            "patient64541", "patient64541/study1", "LATERAL", ["No Finding"], [], "val"),
    }


# MIMIC-CXR

A, B, C = ("02aa804e-bde0afdd-112c0b34-7bc16630-4e384014", "174413ec-4ec4c1f7-34ea26b7-c5f994f8-79ef1962",
           "2a2277a9-b0ded155-c0de8eb9-c124d10e-82c5caab")


def mimic_tables(suffix):
    ids = [(A, 50414267), (B, 50414267), (C, 53189527)]
    return {
        f"mimic-cxr-2.0.0-metadata.csv{suffix}": table(*(
            {"dicom_id": image, "subject_id": 10000032, "study_id": study,
             "PerformedProcedureStepDescription": "CHEST (PA AND LAT)", "ViewPosition": view, "Rows": 3056,
             "Columns": 2544, "StudyDate": 21800506, "StudyTime": 213014.531,
             "ProcedureCodeSequence_CodeMeaning": "CHEST (PA AND LAT)", "ViewCodeSequence_CodeMeaning": "",
             "PatientOrientationCodeSequence_CodeMeaning": "Erect"}
            for (image, study), view in zip(ids, ("PA", "LL", ""), strict=True))),
        f"mimic-cxr-2.0.0-split.csv{suffix}": table(*(
            {"dicom_id": image, "study_id": study, "subject_id": 10000032, "split": split}
            for (image, study), split in zip(ids, ("train", "validate", "test"), strict=True))),
        f"mimic-cxr-2.0.0-chexpert.csv{suffix}": table(
            {"subject_id": 10000032, "study_id": 50414267, **findings(Pneumonia="-1.0", Edema="0.0", Atelectasis="1")},
            {"subject_id": 10000032, "study_id": 53189527, **findings(No_Finding="1.0")}),
    }


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mimic_cxr_jpg(put, read, suffix):
    put(f"files/p10/p10000032/s50414267/{A}.jpg", f"files/p10/p10000032/s50414267/{B}.jpg")
    put(**mimic_tables(suffix))
    assert {path: told(image) for path, image in read("mimic_cxr_jpg").items()} == {
        f"files/p10/p10000032/s50414267/{A}.jpg": (
            "10000032", "50414267", "PA", ["Atelectasis"], ["Pneumonia"], "train"),
        f"files/p10/p10000032/s50414267/{B}.jpg": (
            "10000032", "50414267", "LATERAL", ["Atelectasis"], ["Pneumonia"], "val"),
        f"files/p10/p10000032/s53189527/{C}.jpg": ("10000032", "53189527", None, ["No Finding"], [], "test"),
    }


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mimic_cxr_with_and_without_the_tables_of_jpg(put, read, suffix):
    paths = [f"files/p10/p10000032/s50414267/{A}.dcm", f"files/p10/p10000032/s53189527/{C}.dcm"]
    put(*paths)
    put(**{
        f"cxr-record-list.csv{suffix}": table(*({"subject_id": 10000032, "study_id": path.split("/")[3][1:],
                                                "dicom_id": path.split("/")[4][:-4], "path": path} for path in paths)),
        f"cxr-study-list.csv{suffix}": table({"subject_id": 10000032, "study_id": 50414267,
                                             "path": "files/p10/p10000032/s50414267.txt"}),
    })
    assert {path: told(image) for path, image in read("mimic_cxr").items()} == {
        paths[0]: ("10000032", "50414267", None, [], [], None), paths[1]: ("10000032", "53189527", None, [], [], None)}
    put(**mimic_tables(suffix))
    assert {path: told(image) for path, image in read("mimic_cxr").items()} == {
        paths[0]: ("10000032", "50414267", "PA", ["Atelectasis"], ["Pneumonia"], "train"),
        paths[1]: ("10000032", "53189527", None, ["No Finding"], [], "test"),
    }


# BIMCV: PadChest, PadChest-GR, COVID-19

PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"


def padchest_row(number, name, folder, study, patient, projection, labels):
    return {"": number, "ImageID": name, "ImageDir": folder, "StudyDate_DICOM": 20140915, "StudyID": study,
            "PatientID": patient, "PatientBirth": 1930.0, "PatientSex_DICOM": "F", "ViewPosition_DICOM": "",
            "Projection": projection, "MethodProjection": "Manual review of DICOM fields", "Pediatric": "No",
            "ReportID": 4765777, "Report": "sin hallazgos patologic edad pacient .", "MethodLabel": "Physician",
            "Labels": labels, "Localizations": "[]"}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_padchest(put, read, suffix):
    names = [f"2053668664013634823614867989145588646{k}_k6ga2{k}.png" for k in range(5)]
    put(f"0/{names[0]}", f"0/{names[1]}", names[2], f"54/{names[3]}")
    put(**{PADCHEST + suffix: table(
        padchest_row(0, names[0], 0, "s1", "p1", "PA", "['pulmonary fibrosis', 'chronic changes', ' pneumonia', '']"),
        padchest_row(1, names[1], 0, "s1", "p1", "L", "['normal']"),
        padchest_row(2, names[2], 13, "s2", "p2", "AP_horizontal", "['NSG tube', 'NSG tube', 'unchanged']"),
        padchest_row(3, names[3], 54, "s3", "p3", "COSTAL", "[]"),
        padchest_row(4, names[4], 54, "s4", "p4", "AP", ""))})
    assert {path: told(image) for path, image in read("padchest").items()} == {
        f"0/{names[0]}": ("p1", "s1", "PA", ["pulmonary fibrosis", "chronic changes", "pneumonia"], [], None),
        f"0/{names[1]}": ("p1", "s1", "LATERAL", ["normal"], [], None),
        names[2]: ("p2", "s2", "AP_horizontal", ["NSG tube", "unchanged"], [], None),
        f"54/{names[3]}": ("p3", "s3", "COSTAL", [], [], None),
        f"54/{names[4]}": ("p4", "s4", "AP", [], [], None),
    }


def test_padchest_gr_alone_and_beside_padchest(put, read):
    def row(name, label, split, patient):
        return {"StudyID": f"s-{name}", "ImageID": f"{name}.png", "label": label, "boxes_count": 1,
                "extra_boxes_count": 0, "locations": "['pleural', 'apical']", "prior_study": "",
                "progression_status": "", "prior_imageID": "",
                "sentence_en": "Minimal thickening, apical.", "sentence_es": "Mínimo, apical.",
                "study_is_benchmark": "True", "study_is_validation": "False", "split": split, "PatientID": patient,
                "patient_is_benchmark": "True", "PatientBirth": 1940, "PatientSex_DICOM": "M", "label_group": "x",
                "Year": 2015}

    base = "Padchest_GR_files/PadChest_GR"
    put(*(f"{base}/{name}.png" for name in "abc"))
    put(**{"master_table.csv": table(
        row("a", "apical pleural thickening", "train", "p1"), row("a", "cardiomegaly", "train", "p1"),
        row("a", "cardiomegaly", "train", "p1"), row("b", "Normal", "validation", "p2"),
        row("c", "nodule", "test", "p3")), "grounded_reports_20240819.json": "[]"})
    assert {path: told(image) for path, image in read("padchest").items()} == {
        f"{base}/a.png": ("p1", "s-a", None, ["apical pleural thickening", "cardiomegaly"], [], "train"),
        f"{base}/b.png": ("p2", "s-b", None, ["Normal"], [], "val"),
        f"{base}/c.png": ("p3", "s-c", None, ["nodule"], [], "test"),
    }
    put("0/d.png")
    put(**{PADCHEST: table(padchest_row(0, "a.png", 3, "s-a", "p1", "PA", "['mass']"),
                           padchest_row(1, "d.png", 0, "s-d", "p1", "L", "['mass']"))})
    assert {path: told(image) for path, image in read("padchest").items()} == {
        f"{base}/a.png": ("p1", "s-a", "PA", ["apical pleural thickening", "cardiomegaly"], [], "train"),
        "0/d.png": ("p1", "s-d", "LATERAL", ["mass"], [], None),
    }


@pytest.mark.parametrize(("positive", "negative"), [
    ("labels_covid19_posi.tsv", "labels_SARS-cov-2_nega.tsv"), ("labels_covid_posi.tsv", "Labels_covid_NEG_JAN21.tsv"),
    ("Labels_covid_123.tsv", "Labels_covid_NEG_JAN21.tsv")])
def test_bimcv_covid19(put, read, positive, negative):
    def row(subject, session, labels):
        return {"": 0, "PatientID": subject, "ReportID": session, "Report": "opacidad, derrame", "Labels": labels,
                "Localizations": "['loc basal']", "labelCUIS": "['C0521530']"}

    a = "covid19_posi/sub-S03047/ses-E07985/mod-rx/sub-S03047_ses-E07985_run-1_bp-chest_vp-ap_cr"
    b = "covid19_posi/sub-S03047/ses-E08123/mod-rx/sub-S03047_ses-E08123_acq-2_run-1_bp-chest_vp-ll_dx"
    c = "covid19_neg/sub-S09934/ses-E17062/mod-rx/sub-S09934_ses-E17062_run-1_bp-chest_vp-pa_dx"
    d = "covid19_neg/sub-S10001/ses-E17100/mod-rx/sub-S10001_ses-E17100_run-1_bp-chest_dx"
    put(*(f"{stem}{suffix}" for stem in (a, b, c, d) for suffix in (".png", ".json")),
        "covid19_posi/sub-S03047/ses-E07985/mod-ct/sub-S03047_ses-E07985_run-1_bp-chest_ct.nii.gz")
    put(**{
        "covid19_posi/participants.tsv": table({"participant": "sub-S03047", "modality_dicom": "['CR', 'DX']",
                                                "age": "[64]", "gender": "F"}, delimiter="\t"),
        f"covid19_posi/derivatives/labels/{positive}": table(
            row("sub-S03047", "ses-E07985", "['pneumonia', 'COVID 19', 'increased density']"),
            row("sub-S03047", "ses-E08123", "['COVID 19 uncertain', 'pleural effusion']"), delimiter="\t"),
        f"covid19_neg/derivatives/labels/{negative}": table(
            row("sub-S09934", "ses-E17062", "['normal']"), delimiter="\t"),
        "listjoin_ok.tsv": table({"": 0, "covid19_neg": "sub-S09934", "covid19_posi": "sub-S03047"}, delimiter="\t"),
    })
    expected = {
        f"{a}.png": ("sub-S03047", "ses-E07985", "AP", ["pneumonia", "COVID 19", "increased density"], [], None),
        f"{b}.png": ("sub-S03047", "ses-E08123", "LATERAL", ["pleural effusion"], ["COVID 19"], None),
        f"{c}.png": ("sub-S03047", "ses-E17062", "PA", ["normal"], [], None),
        f"{d}.png": ("sub-S10001", "ses-E17100", None, [], [], None),
    }
    assert {path: told(image) for path, image in read("bimcv_covid19").items()} == expected
    assert {f"covid19_neg/{path}": image.labels for path, image in read("bimcv_covid19", "covid19_neg").items()} == {
        f"{c}.png": ["normal"], f"{d}.png": []}, "one partition alone"


# VinDr


def vindr_row(image, reader, disease="Other diseases", **stated):
    names = ("Aortic enlargement", "Nodule/Mass", "Pleural effusion", "Tuberculosis", disease, "No finding")
    return {"image_id": image} | ({"rad_id": reader} if reader else {}) | dict.fromkeys(names, 0) | stated


def test_vindr_cxr(put, read):
    put("train/a.dicom", "train/b.dicom", "test/c.dicom")
    mass = {"Nodule/Mass": 1}
    put(**{
        "annotations/image_labels_train.csv": table(
            vindr_row("a", "R1", **mass, Tuberculosis=1), vindr_row("a", "R2", **mass),
            vindr_row("a", "R3", **{"No finding": 1}),
            *(vindr_row("b", f"R{k}", **{"No finding": 1}) for k in (8, 9, 10)),
            vindr_row("gone", "R1", **mass), vindr_row("gone", "R2", **{"Other diseases": 1})),
        "annotations/image_labels_test.csv": table(vindr_row("c", None, "Other disease", **{"Other disease": 1})),
        "annotations/annotations_train.csv": table({"image_id": "a", "rad_id": "R1", "class_name": "Nodule/Mass"}),
    })
    assert {path: told(image) for path, image in read("vindr_cxr").items()} == {
        "train/a.dicom": (None, None, "PA", ["Nodule/Mass"], [], "train"),
        "train/b.dicom": (None, None, "PA", ["No finding"], [], "train"),
        "train/gone.dicom": (None, None, "PA", [], ["Nodule/Mass", "Other diseases"], "train"),
        "test/c.dicom": (None, None, "PA", ["Other disease"], [], "test"),
    }


def test_vindr_cxr_of_kaggle(put, read):
    def row(image, reader, name):
        return {"image_id": image, "class_name": name, "class_id": 3, "rad_id": reader, "x_min": "", "y_min": "",
                "x_max": "", "y_max": ""}

    put("train/a.dicom", "train/b.dicom", "test/c.dicom")
    put(**{"train.csv": table(
        row("a", "R8", "Cardiomegaly"), row("a", "R8", "Cardiomegaly"), row("a", "R9", "Cardiomegaly"),
        row("a", "R10", "ILD"), *(row("b", f"R{k}", "No finding") for k in (1, 2, 3)))})
    assert {path: told(image) for path, image in read("vindr_cxr").items()} == {
        "train/a.dicom": (None, None, "PA", ["Cardiomegaly"], [], "train"),
        "train/b.dicom": (None, None, "PA", ["No finding"], [], "train"),
        "test/c.dicom": (None, None, "PA", [], [], TRAIN_ONLY),
    }


def test_vindr_pcxr(put, read):
    def row(image, *stated):
        return {"image_id": image, "rad_ID": "R1"} | {name: int(name in stated) for name in (
            "No finding", "Bronchitis", "Brocho-pneumonia", "Other disease", "Diagphramatic hernia", "CPAM")}

    put("train/a.dicom", "test/b.dicom")
    put(**{"image_labels_train.csv": table(row("a", "Bronchitis", "Brocho-pneumonia")),
           "image_labels_test.csv": table(row("b", "No finding"))})
    assert {path: told(image) for path, image in read("vindr_pcxr").items()} == {
        "train/a.dicom": (None, None, None, ["Bronchitis", "Brocho-pneumonia"], [], "train"),
        "test/b.dicom": (None, None, None, ["No finding"], [], "test"),
    }


# BRAX, RSNA, SIIM-ACR


@pytest.mark.parametrize("name", ["master_spreadsheet_update.csv", "master_spreadsheet.csv"])
@pytest.mark.parametrize("below", ["", "physionet.org/files/brax/1.1.0/"])
def test_brax(put, read, name, below):
    def paths(patient, series):
        tail = f"id_{patient}/Study_26712127.53588676/Series_{series}/image-{series}"
        return f"images/{tail}.png", f"Anonymized_DICOMs/{tail}.dcm"

    def row(patient, series, view, **stated):
        png, dicom = paths(patient, series)
        return {"": 0, "DicomPath": dicom, "PngPath": png, "PatientID": patient, "PatientSex": "F", "PatientAge": 45,
                "AccessionNumber": "2017.0", "StudyDate": "20081213", **findings(**stated), "ViewPosition": view,
                "Rows": 2048, "Columns": 2048, "Manufacturer": 1}

    both, dicom_only = paths("0ef", 1), paths("0ef", 2)
    put(*(below + path for path in (*both, dicom_only[1])))
    put(**{below + name: table(row("0ef", 1, "PA", Cardiomegaly="1.0", Pneumonia="-1.0", Edema="0.0"),
                               row("0ef", 2, "RL", No_Finding="1.0"), row("1aa", 3, "RLO"), row("1aa", 4, ""))})
    assert {path: told(image) for path, image in read("brax").items()} == {
        below + both[0]: ("0ef", "2017.0", "PA", ["Cardiomegaly"], ["Pneumonia"], None),
        below + dicom_only[1]: ("0ef", "2017.0", "LATERAL", ["No Finding"], [], None),
        below + paths("1aa", 3)[0]: ("1aa", "2017.0", "RLO", [], [], None),
        below + paths("1aa", 4)[0]: ("1aa", "2017.0", None, [], [], None),
    }


def test_rsna_pneumonia(put, read):
    classes = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")
    put(*(f"stage_2_train_images/{name}.dcm" for name in ("00436515", "0004cfab", "003d8fa0")),
        "stage_2_test_images/0000a175.dcm")
    put(**{
        "stage_2_detailed_class_info.csv": table(*(
            {"patientId": patient, "class": classes[k]}
            for patient, k in (("00436515", 0), ("00436515", 0), ("0004cfab", 1), ("003d8fa0", 2)))),
        "stage_2_train_labels.csv": table(
            {"patientId": "00436515", "x": 264.0, "y": 152.0, "width": 213.0, "height": 379.0, "Target": 1},
            {"patientId": "0004cfab", "Target": 0}),
    })
    expected = {
        "stage_2_train_images/00436515.dcm": ("00436515", None, None, [classes[0]], [], "train"),
        "stage_2_train_images/0004cfab.dcm": ("0004cfab", None, None, [], [], "train"),
        "stage_2_train_images/003d8fa0.dcm": ("003d8fa0", None, None, ["No Finding"], [], "train"),
        "stage_2_test_images/0000a175.dcm": ("0000a175", None, None, [], [], TRAIN_ONLY),
    }
    assert {path: told(image) for path, image in read("rsna_pneumonia").items()} == expected
    put(**{"pneumonia-challenge-dataset-mappings_2018.json": json.dumps([
        {"subset_img_id": name, "img_id": image, "orig_labels": ["No Finding"]}
        for name, image in (("00436515", "00012345_001.png"), ("0004cfab", "00012345_007.png"),
                            ("0000a175", "00000009_000.png"))])})
    assert [image.patient for image in read("rsna_pneumonia").values()] == ["12345", "12345", "003d8fa0", "9"]


def test_siim_acr(put, read):
    uid = "1.2.276.0.7230010.3.1"
    one, none, two, late = ((f"{uid}.2.8323329.{k}", f"{uid}.4.8323329.{k}") for k in range(4))

    def path(ids, folder="dicom-images-train"):
        return f"{folder}/{ids[0]}/{uid}.3.8323329.9/{ids[1]}.dcm"

    put(path(one), path(none), path(two), path(late, "dicom-images-test"), "stage_2_images/ID_0011fe81e.dcm")
    put(**{"train-rle.csv": "ImageId, EncodedPixels\n" + "".join(f"{image}, {runs}\n" for image, runs in (
        (one[1], "407576 2 1021 7"), (none[1], "-1"), (two[1], "18 3"), (two[1], "500000 1 1022 2")))})
    found = read("siim_acr")
    assert {path: (*told(image), image.masks) for path, image in found.items()} == {
        path(one): (one[0], one[0], None, ["Pneumothorax"], [], "train", (
            ListedMask("pneumothorax", rle="407576 2 1021 7"),)),
        path(none): (none[0], none[0], None, [], [], "train", (ListedMask("pneumothorax", rle=""),)),
        path(two): (two[0], two[0], None, ["Pneumothorax"], [], "train", (
            ListedMask("pneumothorax", rle="18 3"), ListedMask("pneumothorax", rle="500000 1 1022 2"))),
        path(late, "dicom-images-test"): (late[0], late[0], None, [], [], TRAIN_ONLY, ()),
        "stage_2_images/ID_0011fe81e.dcm": (None, None, None, [], [], TRAIN_ONLY, ()),
    }
    put(**{"stage_2_train.csv": table({"ImageId": one[1], "EncodedPixels": "-1"},
                                      {"ImageId": late[1], "EncodedPixels": "7 3"})})
    found = read("siim_acr")
    assert found[path(late, "dicom-images-test")].split == "test"
    assert found[path(late, "dicom-images-test")].masks == (ListedMask("pneumothorax", rle="7 3"),)
    assert found[path(one)].labels == []


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_told_with_the_owner(tmp_path, name):
    module = importlib.import_module(f"pipelines.data.sources.{name}")
    with pytest.raises(ValueError, match=r"holds no .*csv|holds no .*tsv") as error:
        module.SOURCE.manifest(DataSettings(source=name, root=str(tmp_path)), 0)
    for part in (str(tmp_path), module.CARD.title, module.CARD.where):
        assert part in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_no_root_is_told_with_what_to_sign(name):
    module = importlib.import_module(f"pipelines.data.sources.{name}")
    with pytest.raises(ValueError, match=r"data\.root") as error:
        module.SOURCE.manifest(DataSettings(source=name), 0)
    assert module.CARD.sign in str(error.value)


@pytest.mark.parametrize(("name", "file", "column"), [
    ("chexpert", "train.csv", "Path"), ("mimic_cxr_jpg", "mimic-cxr-2.0.0-chexpert.csv", "study_id"),
    ("mimic_cxr", "cxr-record-list.csv", "subject_id"), ("padchest", PADCHEST, "ImageID"),
    ("padchest", "master_table.csv", "ImageID"), ("bimcv_covid19", "labels_covid_posi.tsv", "ReportID"),
    ("vindr_cxr", "image_labels_train.csv", "image_id"), ("vindr_cxr", "train.csv", "image_id"),
    ("vindr_pcxr", "image_labels_test.csv", "image_id"), ("brax", "master_spreadsheet_update.csv", "PngPath"),
    ("rsna_pneumonia", "stage_2_detailed_class_info.csv", "patientId"), ("siim_acr", "train-rle.csv", "ImageId")])
def test_a_table_without_a_column_is_told(put, read, name, file, column):
    put(**{file: "other\nx\n"})
    if name == "chexpert":
        put(**{file: table({"other": "x", "AP/PA": ""})})
    with pytest.raises(ValueError, match=rf"{file[:8]}.* has no column '{column}'"):
        read(name)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_a_config_for_each(name):
    from pipelines.graph.compose import load_settings

    assert load_settings(f"data={name.replace('_', '-')}").data.source == name
