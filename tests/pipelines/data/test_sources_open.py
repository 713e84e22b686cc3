"""Sources of open data sets and of data of one's own: each tree below is laid out exactly as its owner's."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from cluster import faults
from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data.image.picture import Refused
from pipelines.data.public_set import Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources import (
    covidx_cxr4,
    dicom,
    huggingface,
    hyperkvasir,
    jsrt,
    kermany,
    kvasir_seg,
    manifest,
    medmnist,
    montgomery,
    shenzhen,
)
from pipelines.graph.compose import load_settings

TREES = (covidx_cxr4, dicom, hyperkvasir, jsrt, kermany, kvasir_seg, montgomery, shenzhen)


@pytest.fixture
def fill(tmp_path):
    """Write files (of two bytes, where no content is given) below a folder; returns the settings of a source on it."""

    def write(*paths: str, **contents: bytes | str):
        for path, content in {**dict.fromkeys(paths, b"xx"), **contents.pop("files", {})}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content.encode() if isinstance(content, str) else content)
        return DataSettings(source="", root=str(tmp_path), **contents)

    return write


def described(module, settings):
    """What a module says of each image, by path."""
    tree = Tree(settings.root, module.CARD)
    listed = list(module.images(tree, settings))
    if hasattr(module, "described"):
        listed = [image for one in listed if (image := module.described(tree.folder, one.path, settings))]
    assert len({image.path for image in listed}) == len(listed)
    return {image.path: (image.patient, image.study, image.view, list(image.labels), image.split,
                         {mask.name: mask.path for mask in image.masks}) for image in listed}


def picture(value: int = 0, size: int = 32) -> bytes:
    pixels = (np.arange(size * size).reshape(size, size) + value).astype(np.uint8)
    content = io.BytesIO()
    Picture.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("module", TREES)
def test_an_empty_folder_names_the_set_and_where_it_is_given_out(module, fill):
    for settings in (fill(), fill("README.md", "other/x.txt")):
        with pytest.raises(ValueError, match="holds no") as error:
            module.SOURCE.manifest(settings, 0)
        assert module.CARD.title in str(error.value)
        assert module.CARD.where in str(error.value)


@pytest.mark.parametrize("module", [huggingface, medmnist])
def test_an_empty_folder_names_what_is_missing(module, fill, monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(ValueError, match="holds no") as error:
        module.SOURCE.manifest(fill(subset="pneumoniamnist" if module is medmnist else None), 0)
    assert module.CARD.title in str(error.value)
    assert module.CARD.where in str(error.value)


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"list\.csv.*CSV, TSV or Parquet"):
        manifest.SOURCE.manifest(DataSettings(source="manifest", root=str(tmp_path / "list.csv")), 0)


@pytest.mark.parametrize("module", [*TREES, huggingface, manifest])
def test_no_root_is_told(module):
    with pytest.raises(ValueError, match=r"data\.root"):
        module.SOURCE.manifest(DataSettings(source=""), 0)


@pytest.mark.parametrize("module", [*TREES, huggingface, manifest, medmnist])
def test_each_has_a_setting_of_its_name(module):
    name = module.__name__.rsplit(".", 1)[-1]
    assert load_settings(f"data={name.replace('_', '-')}", "name=x").data.source == name
    assert getattr(module.SOURCE, "name", name) == name
    if hasattr(module, "CARD"):
        assert module.SOURCE.card is module.CARD


@pytest.mark.parametrize("base", ["", "COVIDx/"])
def test_covidx_cxr4(fill, base):
    settings = fill(
        *(f"{base}{path}" for path in ("train/a (1).png", "train/MIDRC-RICORD-1C-SITE2-1-0.png", "val/b.jpg",
                                       "test/c.png")),
        files={f"{base}train.txt": "SITE2-000265 MIDRC-RICORD-1C-SITE2-1-0.png positive ricord\n"
                                   "379 a (1).png positive cohen\n47c78742 gone.png negative rsna\n",
               f"{base}val.txt": "sub-S03047 b.jpg negative bimcv\r\n", f"{base}test.txt": "9 c.png negative rsna\n"})
    found = described(covidx_cxr4, settings)
    assert found.pop(f"{base}train/gone.png")[0] == "47c78742"
    assert found == {
        f"{base}train/MIDRC-RICORD-1C-SITE2-1-0.png": ("SITE2-000265", None, None, ["positive"], "train", {}),
        f"{base}train/a (1).png": ("379", None, None, ["positive"], "train", {}),
        f"{base}val/b.jpg": ("sub-S03047", None, None, [], "val", {}),
        f"{base}test/c.png": ("9", None, None, [], "test", {}),
    }
    assert covidx_cxr4.SOURCE.manifest(settings, 0).num_rows == 4, "what is not there is left out"


def test_covidx_cxr4_tells_a_missing_or_broken_list(fill):
    settings = fill("train/a.png", "val/b.png", files={"train.txt": "1 a.png positive cohen\n"})
    with pytest.raises(ValueError, match=r"val\.txt of COVIDx CXR-4"):
        described(covidx_cxr4, settings)
    fill(files={"val.txt": "1 b.png positive cohen\n2 c.png maybe cohen\n"})
    with pytest.raises(ValueError, match=r"val\.txt, line 2.*maybe"):
        described(covidx_cxr4, settings)


def test_kermany_of_kaggle(fill):
    names = ("train/NORMAL/IM-0115-0001.jpeg", "train/PNEUMONIA/person1_bacteria_1.jpeg",
             "val/PNEUMONIA/person1_virus_6.jpeg", "test/NORMAL/NORMAL2-IM-0824-0001-0001.jpeg")
    settings = fill(*(f"{base}/{name}" for name in names for base in ("chest_xray", "chest_xray/chest_xray")),
                    "chest_xray/__MACOSX/chest_xray/train/NORMAL/._IM-0115-0001.jpeg")
    assert described(kermany, settings) == {
        f"chest_xray/chest_xray/{names[0]}": ("IM-0115", None, "AP", ["NORMAL"], "train", {}),
        f"chest_xray/chest_xray/{names[1]}": ("person1_bacteria", None, "AP", ["PNEUMONIA", "bacteria"], "train", {}),
        f"chest_xray/chest_xray/{names[2]}": ("person1_virus", None, "AP", ["PNEUMONIA", "virus"], "val", {}),
        f"chest_xray/chest_xray/{names[3]}": ("NORMAL2-IM-0824", None, "AP", ["NORMAL"], "test", {}),
    }


def test_kermany_of_mendeley(fill):
    settings = fill("chest_xray/train/NORMAL/NORMAL-1003233-0001.jpeg", "NORMAL/IM-0001-0001.jpeg",
                    "chest_xray/train/PNEUMONIA/BACTERIA-40699-0001.jpeg",
                    "chest_xray/test/PNEUMONIA/VIRUS-40699-0002.jpeg", "OCT2017/train/CNV/CNV-1016042-1.jpeg")
    assert described(kermany, settings) == {
        "NORMAL/IM-0001-0001.jpeg": ("IM-0001", None, "AP", ["NORMAL"], None, {}),
        "chest_xray/train/NORMAL/NORMAL-1003233-0001.jpeg": ("1003233", None, "AP", ["NORMAL"], "train", {}),
        "chest_xray/train/PNEUMONIA/BACTERIA-40699-0001.jpeg":
            ("40699", None, "AP", ["PNEUMONIA", "bacteria"], "train", {}),
        "chest_xray/test/PNEUMONIA/VIRUS-40699-0002.jpeg": ("40699", None, "AP", ["PNEUMONIA", "virus"], "test", {}),
    }


def test_kermany_as_it_is_here(real_data):
    found = described(kermany, DataSettings(source="kermany", root=str(real_data("kermany"))))
    count = {name: sum(row[4] == name for row in found.values()) for name in ("train", "val", "test")}
    assert count == {"train": 4421, "val": 308, "test": 503}
    splits = {}
    for patient, *_, split, _ in found.values():
        assert patient
        splits.setdefault(patient, set()).add(split)
    assert all(len(s) == 1 for s in splits.values())


def test_jsrt(fill):
    table = ("JPCLN001.IMG\t5\t15\t53\tmale\t1634\t692\tmalignant\tl.upper lobe\tlung cancer\r"
             "JPCLN002.IMG\t5\t30\t78\tfemale\t1614\t1090\tbenign\tl.upper lobe(S5)\tpulmonary hematoma\r\r")
    settings = fill(
        "All247images/JPCLN001.IMG", "All247images/JPCLN002.IMG", "All247images/JPCNN001.IMG",
        "Nodule154images/JPCLN001.IMG", "scratch/fold1/masks/left lung/JPCLN001.gif",
        "scratch/fold1/masks/right lung/JPCLN001.gif", "scratch/fold1/masks/heart/JPCLN001.gif",
        "scratch/fold1/masks/left clavicle/JPCLN001.gif", "scratch/fold1/landmarks/JPCLN001.pfs",
        "scratch/fold2/masks/heart/JPCLN002.gif",
        files={"Clinical_Information/CLNDAT_EN.txt": table,
               "Clinical_Information/CNNDAT_EN.TXT": "JPCNN001.IMG   66  male  non-nodule\r"})
    masks = "scratch/fold1/masks"
    assert described(jsrt, settings) == {
        "All247images/JPCLN001.IMG": ("JPCLN001", None, "PA", ["nodule", "malignant"], None, {
            "left_lung": f"{masks}/left lung/JPCLN001.gif", "right_lung": f"{masks}/right lung/JPCLN001.gif",
            "heart": f"{masks}/heart/JPCLN001.gif"}),
        "All247images/JPCLN002.IMG": ("JPCLN002", None, "PA", ["nodule", "benign"], None,
                                      {"heart": "scratch/fold2/masks/heart/JPCLN002.gif"}),
        "All247images/JPCNN001.IMG": ("JPCNN001", None, "PA", [], None, {}),
    }


def test_jsrt_tells_a_missing_table_or_column(fill):
    settings = fill("All247images/JPCLN001.IMG")
    with pytest.raises(ValueError, match=r"CLNDAT_EN\.txt.*JSRT.*db\.jsrt\.or\.jp"):
        described(jsrt, settings)
    fill(files={"labels.csv": "image,patient\nJPCLN001.png,JPCLN001\n"})
    with pytest.raises(ValueError, match=r"labels\.csv has no column 'label'"):
        described(jsrt, settings)


def test_jsrt_as_it_is_here(real_data):
    found = described(jsrt, DataSettings(source="jsrt", root=str(real_data("jsrt"))))
    assert len(found) == 186
    assert sum(row[3] == ["nodule"] for row in found.values()) == 116
    assert sum(row[3] == ["normal"] for row in found.values()) == 70
    assert found["images/JPCLN001.png"] == ("JPCLN001", None, "PA", ["nodule"], None, {
        name: f"masks/{name}/JPCLN001.png" for name in ("left_lung", "right_lung", "heart")})
    assert all(len(row[5]) == 3 for row in found.values())


@pytest.mark.parametrize("base", ["", "MontgomerySet/"])
def test_montgomery(fill, base):
    settings = fill(
        *(f"{base}{path}" for path in (
            "CXR_png/MCUCXR_0001_0.png", "CXR_png/MCUCXR_0104_1.png", "CXR_png/Thumbs.db",
            "ManualMask/leftMask/MCUCXR_0001_0.png", "ManualMask/rightMask/MCUCXR_0001_0.png",
            "ClinicalReadings/MCUCXR_0001_0.txt", "CXR_png/CHNCXR_0001_0.png")))
    assert described(montgomery, settings) == {
        f"{base}CXR_png/MCUCXR_0001_0.png": ("MCUCXR_0001", None, "PA", ["normal"], None, {
            "left_lung": f"{base}ManualMask/leftMask/MCUCXR_0001_0.png",
            "right_lung": f"{base}ManualMask/rightMask/MCUCXR_0001_0.png"}),
        f"{base}CXR_png/MCUCXR_0104_1.png": ("MCUCXR_0104", None, "PA", ["tuberculosis"], None, {}),
    }


def test_montgomery_and_shenzhen_of_one_folder(fill):
    settings = fill("Lung Segmentation/CXR_png/MCUCXR_0001_0.png", "Lung Segmentation/CXR_png/CHNCXR_0327_1.png",
                    "Lung Segmentation/masks/MCUCXR_0001_0.png", "Lung Segmentation/masks/CHNCXR_0327_1_mask.png",
                    "Lung Segmentation/test/CHNCXR_0025_0.png")
    assert described(montgomery, settings) == {
        "Lung Segmentation/CXR_png/MCUCXR_0001_0.png":
            ("MCUCXR_0001", None, "PA", ["normal"], None, {"lungs": "Lung Segmentation/masks/MCUCXR_0001_0.png"})}
    assert described(shenzhen, settings) == {
        "Lung Segmentation/CXR_png/CHNCXR_0327_1.png":
            ("CHNCXR_0327", None, "PA", ["tuberculosis"], None,
             {"lungs": "Lung Segmentation/masks/CHNCXR_0327_1_mask.png"})}


def test_shenzhen(fill):
    settings = fill("ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png", "ChinaSet_AllFiles/CXR_png/CHNCXR_0662_1.png",
                    "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png/CHNCXR_0662_1.png",
                    "ChinaSet_AllFiles/ClinicalReadings/CHNCXR_0001_0.txt", "mask/mask/CHNCXR_0001_0_mask.png")
    found = described(shenzhen, settings)
    assert [row[:5] for row in found.values()] == [("CHNCXR_0001", None, "PA", ["normal"], None),
                                                   ("CHNCXR_0662", None, "PA", ["tuberculosis"], None)]
    assert [row[5] for row in found.values()] == [{"lungs": "mask/mask/CHNCXR_0001_0_mask.png"}, {}]


def test_kvasir_seg(fill):
    names = ("cju0qkwl35piu0993l0dewei2", "cju0qoxqj9q6s0835b43399p4", "cju0qx73cjw570799j4n5cjze")
    settings = fill(*(f"Kvasir-SEG/{folder}/{name}.jpg" for folder in ("images", "masks") for name in names[:2]),
                    f"Kvasir-SEG/images/{names[2]}.jpg", files={"Kvasir-SEG/kavsir_bboxes.json": "{}"})
    assert described(kvasir_seg, settings) == {
        f"Kvasir-SEG/images/{name}.jpg": (None, None, None, ["polyp"], None, masks)
        for name, masks in zip(names, (*({"polyp": f"Kvasir-SEG/masks/{n}.jpg"} for n in names[:2]), {}), strict=True)}
    fill(files={"train.txt": f"{names[0]}\n{names[2]}\n", "val.txt": f"{names[1]}\n"})
    assert [row[4] for row in described(kvasir_seg, settings).values()] == ["train", "val", "train"]


def test_kvasir_seg_as_it_is_here(real_data):
    found = described(kvasir_seg, DataSettings(source="kvasir_seg", root=str(real_data("kvasir-seg"))))
    assert [sum(row[4] == split for row in found.values()) for split in ("train", "val")] == [800, 100]
    assert found["validation/images/0.jpg"] == (None, None, None, ["polyp"], "val",
                                                {"polyp": "validation/masks/0.jpg"})


def test_hyperkvasir(fill, tmp_path):
    settings = fill("segmented-images/images/a.jpg", "segmented-images/masks/a.jpg", "unlabeled-images/images/b.jpg",
                    "labeled-images/lower-gi-tract/pathological-findings/polyps/c.jpg",
                    files={"segmented-images/bounding-boxes.json": "{}"})
    assert described(hyperkvasir, settings) == {
        "segmented-images/images/a.jpg": (None, None, None, ["polyp"], None, {"polyp": "segmented-images/masks/a.jpg"})}
    settings.root = str(tmp_path / "segmented-images")
    assert list(described(hyperkvasir, settings)) == ["images/a.jpg"]


@pytest.fixture
def npz(tmp_path):
    """Write a file of MedMNIST with two images a split; returns settings on its folder."""

    def write(name: str, labels: list, side: int = 28, channels: tuple = (), **values):
        count = len(labels)
        pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, *channels), np.uint8)
        arrays = {f"{split}_{kind}": array for split in medmnist.SPLITS
                  for kind, array in (("images", pixels), ("labels", np.array(labels, np.uint8)))}
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
        return DataSettings(source="medmnist", root=str(tmp_path), **values)

    return write


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(medmnist.tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    yield
    medmnist._images.cache_clear()


def test_medmnist_lists_and_loads(npz, scratch):
    settings = npz("pneumoniamnist", [[1], [0]], subset="pneumoniamnist", size=28)
    rows = medmnist.SOURCE.manifest(settings, 0).to_pylist()
    assert [(row["uri"], row["split"], row["labels"]) for row in rows] == [
        (f"medmnist://pneumoniamnist/28/{split}/{k}", split, [label])
        for split in ("train", "val", "test") for k, label in enumerate(("Pneumonia", "No Finding"))]
    assert len({row["patient_id"] for row in rows}) == 6
    loaded = medmnist.SOURCE.load(rows[1], settings)
    assert (loaded.width, loaded.height, loaded.image.shape) == (28, 28, (28, 28))
    with np.load(f"{settings.root}/pneumoniamnist.npz") as arrays:
        np.testing.assert_array_equal(loaded.image, arrays["train_images"][1])


def test_medmnist_of_many_labels_and_of_colour(npz, scratch):
    settings = npz("chestmnist", [[1, 0, 1, *[0] * 11], [0] * 14], subset="chestmnist", size=28)
    assert [row["labels"] for row in medmnist.SOURCE.rows(settings)][:2] == [["Atelectasis", "Pleural Effusion"], []]
    settings = npz("bloodmnist_64", [[0], [7]], 64, (3,), subset="bloodmnist", size=32)
    rows = list(medmnist.SOURCE.rows(settings))
    assert rows[1]["labels"] == ["platelet"]
    assert medmnist.SOURCE.load(rows[0], settings).image.shape == (32, 32)


@pytest.mark.parametrize(("there", "subset", "size", "taken"), [
    ((28, 64, 128), "pneumoniamnist", 28, 28), ((28, 64, 128), "pneumoniamnist", 32, 64),
    ((28, 224), "pneumoniamnist", 64, 224), ((28, 64), "pneumoniamnist", 256, 64), ((28,), "pneumoniamnist", 32, 28),
    ((28, 64), "pneumoniamnist_28", 64, 28), ((28, 64), "pneumoniamnist_64", 28, 64),
])
def test_medmnist_takes_the_smallest_that_is_large_enough(npz, there, subset, size, taken):
    for each in there:
        settings = npz(medmnist._file("pneumoniamnist", each).removesuffix(".npz"), [[0]], subset=subset, size=size)
    assert medmnist._find(settings) == ("pneumoniamnist", taken)


@pytest.mark.parametrize("subset", [None, "organmnist3d", "pneumoniamnist_32", "PneumoniaMNIST"])
def test_medmnist_names_the_subsets(npz, subset):
    with pytest.raises(ValueError, match=r"data\.subset=.*pathmnist.*tissuemnist"):
        medmnist.SOURCE.manifest(npz("pneumoniamnist", [[0]], subset=subset), 0)


def test_medmnist_tells_a_file_that_is_none_of_its_own(fill):
    settings = fill("pneumoniamnist.npz", subset="pneumoniamnist", size=28)
    with pytest.raises(ValueError, match=r"pneumoniamnist\.npz is no file of MedMNIST"):
        medmnist.SOURCE.manifest(settings, 0)
    np.savez(f"{settings.root}/pneumoniamnist.npz", train_labels=np.zeros((1, 1)))
    with pytest.raises(ValueError, match="val_labels"):
        medmnist.SOURCE.manifest(settings, 0)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = b'{"info": {"features": {"image": {"_type": "Image"}, "%s": %s}}}'
CLASS = b'{"names": ["NORMAL", "PNEUMONIA"], "_type": "ClassLabel"}'


def parquet(columns: dict, features: bytes | None = None, rows: int = 3, image: str = "image") -> bytes:
    cells = pa.array([{"bytes": picture(k), "path": f"{k}.png"} for k in range(rows)], IMAGE)
    table = pa.table({image: cells, **columns})
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"huggingface": features} if features else None), content,
                   row_group_size=2)
    return content.getvalue()


def listed(settings):
    return huggingface.SOURCE.manifest(settings, 0).to_pylist()


def test_huggingface_with_classes(fill, tmp_path):
    labels = {"label": pa.array([0, 1, -1])}
    settings = fill(size=32, files={
        "data/train-00000-of-00002.parquet": parquet(labels, CLASSES % (b"label", CLASS)),
        "data/validation-00000-of-00001.parquet": parquet(labels, CLASSES % (b"label", CLASS)),
        "data/test-00000-of-00001.parquet": parquet(labels, CLASSES % (b"label", CLASS)), "README.md": "x"})
    rows = listed(settings)
    assert [(row["path"], row["split"], row["labels"]) for row in rows] == [
        (f"data/{name}.parquet#{k}", split, label)
        for name, split in (("test-00000-of-00001", "test"), ("train-00000-of-00002", "train"),
                            ("validation-00000-of-00001", "val"))
        for k, label in enumerate((["No Finding"], ["Pneumonia"], []))]
    assert [row["absent"] for row in rows[:3]] == [["Pneumonia"], ["No Finding"], []], "-1 is no label, and no negative"
    assert rows[0]["uri"] == f"{tmp_path}/data/test-00000-of-00001.parquet#0"
    for k in range(3):  # in both row groups
        loaded = huggingface.SOURCE.load(rows[k], settings)
        np.testing.assert_array_equal(loaded.image, np.asarray(Picture.open(io.BytesIO(picture(k)))))


def test_huggingface_tells_a_corrupt_row_group_from_a_fault_of_the_storage(fill, monkeypatch):
    monkeypatch.setattr(faults, "BACKOFF_SECONDS", ())
    content = bytearray(parquet({}, rows=4))
    images = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    page = images.dictionary_page_offset or images.data_page_offset
    content[page + 40 : page + images.total_compressed_size] = b"\xff" * (images.total_compressed_size - 40)
    settings = fill(size=32, files={"a.parquet": bytes(content)})
    rows = listed(settings)
    with pytest.raises(Refused) as refused:
        huggingface.SOURCE.load(rows[0], settings)
    assert refused.value.reason == "decoder_error"
    assert str(refused.value) == "its row group cannot be decoded: OSError", "and no bytes of the file"
    assert huggingface.SOURCE.load(rows[2], settings).width == 32, "of the next row group"

    class Unplugged(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the mount is gone")

    monkeypatch.setattr(Folder, "filesystem", SimpleNamespace(
        open_input_file=lambda path: pa.PythonFile(Unplugged(content), mode="r")))
    with pytest.raises(faults.StorageUnavailable, match="the mount is gone"):
        huggingface.SOURCE.load(rows[0], settings)


@pytest.mark.parametrize("feature", [
    b'{"_type": "List", "feature": %s}', b'{"_type": "Sequence", "feature": %s}', b"[%s]"])
def test_huggingface_with_lists_of_classes(fill, feature):
    columns = {"labels": pa.array([[0, 1], [], None], pa.list_(pa.int64()))}
    settings = fill(files={"train.parquet": parquet(columns, CLASSES % (b"labels", feature % CLASS))})
    assert [row["labels"] for row in listed(settings)] == [["No Finding", "Pneumonia"], [], []]


@pytest.mark.parametrize("labels", [
    pa.array(["NORMAL", "PNEUMONIA", None]), pa.array([0.0, 1.0, float("nan")]), pa.array([0.0, 1.0, None])])
def test_huggingface_with_classes_that_are_texts_or_decimals(fill, labels):
    settings = fill(files={"train.parquet": parquet({"label": labels}, CLASSES % (b"label", CLASS))})
    assert [row["labels"] for row in listed(settings)] == [["No Finding"], ["Pneumonia"], []]


@pytest.mark.parametrize("number", [9, 0.5])
def test_huggingface_with_a_number_that_has_no_name(fill, number):
    settings = fill(files={"train.parquet": parquet({"label": pa.array([0, number, 1])}, CLASSES % (b"label", CLASS))})
    with pytest.raises(UserError, match=rf"train\.parquet#1: label {number} of 2 names \(NORMAL, PNEUMONIA\)"):
        listed(settings)


def test_huggingface_with_plain_columns(fill):
    settings = fill(files={"a.parquet": parquet({
        "labels": pa.array([["x"], ["x", "y"], []]), "patient_id": pa.array([1, 1, 2]),
        "study_id": pa.array(["s", None, ""]), "view": pa.array(["PA", "AP", None]),
        "split": pa.array(["train", "validation", "test"])})})
    assert [tuple(row[name] for name in ("labels", "patient_id", "study_id", "view", "split"))
            for row in listed(settings)] == [
        (["x"], "1", "s", "PA", "train"), (["x", "y"], "1", None, "AP", "val"), ([], "2", None, None, "test")]


def test_huggingface_without_labels_or_splits(fill):
    settings = fill(files={"part-0.parquet": parquet({}, image="picture")})
    assert [(row["labels"], row["split"]) for row in listed(settings)] == [([], None)] * 3


def test_huggingface_configurations(fill):
    settings = fill(files={f"{config}/train/0000.parquet": parquet({"label": pa.array([config] * 3)})
                           for config in ("small", "large")})
    with pytest.raises(ValueError, match=r"data\.subset to one of large, small"):
        listed(settings)
    settings.subset = "small"
    assert [(row["labels"], row["split"]) for row in listed(settings)] == [(["small"], "train")] * 3
    settings.subset = "middle"
    with pytest.raises(ValueError, match="'middle'"):
        huggingface.SOURCE.manifest(settings, 0)


def test_huggingface_tells_what_is_no_image_set(fill):
    content = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), content)
    with pytest.raises(ValueError, match=r"no column of images.*text"):
        huggingface.SOURCE.manifest(fill(files={"a.parquet": content.getvalue()}), 0)


def test_huggingface_roots(tmp_path):
    assert huggingface._root(DataSettings(source="", root="owner/name")) == "hf://datasets/owner/name"
    assert huggingface._root(DataSettings(source="", root=f"{tmp_path}/")) == str(tmp_path)
    assert huggingface._root(DataSettings(source="", root="s3://bucket/set/")) == "s3://bucket/set"
    with pytest.raises(ValueError, match="no folder"):
        huggingface._root(DataSettings(source="", root="/nowhere/at/all"))


def test_huggingface_tells_a_hub_that_cannot_be_reached(monkeypatch):
    class Unreachable(huggingface.Tree):
        @property
        def files(self):
            raise RuntimeError("no such host")

    monkeypatch.setattr(huggingface, "Tree", Unreachable)
    with pytest.raises(ValueError, match=r"owner/name.*huggingface\.co/datasets.*no such host"):
        huggingface.SOURCE.manifest(DataSettings(source="", root="owner/name"), 0)


def header(**tags) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    content = io.BytesIO()
    dataset = FileDataset(content, {}, file_meta=meta, preamble=b"\0" * 128)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(content, enforce_file_format=False)
    return content.getvalue()


def test_dicom(fill):
    full = header(PatientID="p1", StudyInstanceUID="1.2.3", ViewPosition="PA")
    settings = fill("notes.txt", "broken.dcm", "DICOMDIR", files={
        "a/IM1": full, "a/1.2.840.113": header(PatientID="p1", StudyInstanceUID="1.2.3", ViewPosition="LL"),
        "b/x.dcm": header(PatientID="p2", ViewPosition=" "), "DICOM/DICOMDIR": full,
        "b/y.DCM": header(ViewPosition="LLD")})
    assert described(dicom, settings) == {
        "a/IM1": ("p1", "1.2.3", "PA", [], None, {}), "a/1.2.840.113": ("p1", "1.2.3", "LATERAL", [], None, {}),
        "b/x.dcm": ("p2", None, None, [], None, {}), "b/y.DCM": (None, None, "LLD", [], None, {}),
        "broken.dcm": (None, None, None, [], None, {}),
    }


def test_dicom_as_it_is_here(real_data):
    root = real_data("dicom")
    found = described(dicom, DataSettings(source="dicom", root=str(root)))
    assert set(found) == {path.name for path in root.iterdir()}
    films = [row for path, row in found.items() if path.startswith("RG1_")]
    assert len(films) == 4
    assert films == [("9RG1", "1.3.6.1.4.1.5962.1.2.9.20040826185059.5457", "PA", [], None, {})] * 4
    assert [found[path][0] for path in ("OT-PAL-8-face.dcm", "bad_sequence.dcm", "vlut_04.dcm")] == [
        None, "b2cbe507f250", "VLUT_nn"]


def test_manifest_of_csv(fill, tmp_path, monkeypatch):
    settings = fill(size=32, files={
        "images/a.png": picture(), "masks/a.png": picture(), "list.csv":
            "path,patient_id,study_id,view,labels,split,mask\nimages/a.png,007,s1,PA,a|b,train,masks/a.png\n"
            "/far/b.png,,,,,valid,\ns3://bucket/c.png,8,,,c,test,s3://bucket/m.png\n,,,,,,\n"})
    settings.root += "/list.csv"
    rows = manifest.SOURCE.manifest(settings, 0).to_pylist()
    assert [(row["uri"], row["patient_id"], row["study_id"], row["view"], row["labels"], row["split"],
             [mask["path"] for mask in row["masks"]]) for row in rows] == [
        (f"{tmp_path}/images/a.png", "007", "s1", "PA", ["a", "b"], "train", ["masks/a.png"]),
        ("/far/b.png", "/far/b.png", None, None, [], "val", []),
        ("s3://bucket/c.png", "8", None, None, ["c"], "test", ["s3://bucket/m.png"])]
    assert [row["absent"] for row in rows] == [["c"], [], ["a", "b"]]
    loaded = manifest.SOURCE.load(rows[0], settings)
    assert loaded.width == 32
    assert np.array_equal(loaded.mask > 0, loaded.image > 127)
    assert loaded.structures == ("mask",)
    monkeypatch.setattr(faults, "BACKOFF_SECONDS", ())
    with pytest.raises(faults.StorageUnavailable):
        manifest.SOURCE.load({"path": "/far/b.png"}, settings)


def test_manifest_that_tells_what_is_absent(fill):
    settings = fill(files={"list.csv": "path,labels,absent,uncertain\na.png,normal,effusion,\nb.png,edema,,Mass|x\n",
                           "a.png": "x"})
    settings.root += "/list.csv"
    rows = manifest.SOURCE.manifest(settings, 0).to_pylist()
    assert [(row["labels"], row["absent"], row["uncertain"]) for row in rows] == [
        (["No Finding"], ["Pleural Effusion"], []), (["Edema"], ["No Finding"], ["Mass", "x"])]


def test_manifest_of_parquet_and_tsv(fill):
    content = io.BytesIO()
    pq.write_table(pa.table({"uri": ["s3://bucket/a.png"], "path": ["a"], "labels": [["x", "y, z"]],
                             "patient_id": [3]}), content)
    settings = fill(files={"list.parquet": content.getvalue(), "list.tsv": "path\tlabels\na.png\tx, y\n",
                           "a.png": "x"})
    root = settings.root
    settings.root = f"{root}/list.parquet"
    row, = manifest.SOURCE.manifest(settings, 0).to_pylist()
    assert (row["uri"], row["patient_id"], row["labels"]) == ("s3://bucket/a.png", "3", ["x", "y, z"])
    settings.root = f"{root}/list.tsv"
    row, = manifest.SOURCE.manifest(settings, 0).to_pylist()
    assert (row["uri"], row["labels"], row["split"]) == (f"{root}/a.png", ["x, y"], None)


@pytest.mark.parametrize(("text", "match"), [
    ("file,labels\na.png,x\n", r"no column 'path' or 'uri'; it has file, labels"),
    ("path,split\na.png,holdout\n", r"a\.png: split 'holdout'"),
    ("path,labels\n", "lists no image"), ("", "no table"),
])
def test_manifest_tells_what_is_wrong(fill, text, match):
    settings = fill(files={"list.csv": text})
    settings.root += "/list.csv"
    with pytest.raises(ValueError, match=match):
        manifest.SOURCE.manifest(settings, 0)
