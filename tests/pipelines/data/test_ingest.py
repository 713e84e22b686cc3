import io
import shutil
from collections import Counter

import numpy as np
import pydicom
import pytest
from conftest import empty, whole
from PIL import Image

from cluster.errors import UserError
from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data import deduplicate, headers
from pipelines.data.identifiers import Salt
from pipelines.data.listing import list_images
from pipelines.data.split import check_filled
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.graph.stage import Stage
from pipelines.tables.images import decode_images
from pipelines.tables.parquet import read_columns, read_shard
from pipelines.tables.schemas import HASHED_MANIFEST

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture = np.random.default_rng(seed).integers(0, 256, (40, 36), np.uint8)
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(seed))).save(buffer, "JPEG")
    return buffer.getvalue()


def constant() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (40, 40), 9).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "train/empty.png": (b"", "empty_file"),
    "train/text.png": (b"no image", "not_an_image"),
    "train/cut.jpg": (jpeg(900)[:-400], "truncated"),
    "val/cut.png": (png(901)[:-400], "truncated"),
    "test/constant.png": (constant(), "constant"),
    "test/broken.dcm": (bytes(128) + b"DICM" + b"\x02\x00rubbish", "not_an_image"),
}


@pytest.fixture
def xrays(tmp_path):
    """A folder of 24 good images, 8 in each split."""

    def write(files: dict[str, bytes] | None = None):
        good = {f"{split}/{name}.png": png(100 * k + j) for k, split in enumerate(("train", "val", "test"))
                for j, name in enumerate("abcdefgh")}
        for path, content in (good | (files or {})).items():
            (tmp_path / "xrays" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "xrays" / path).write_bytes(content)
        return tmp_path / "xrays"

    return write


@pytest.fixture
def settings(tmp_path):
    def compose(*overrides: str):
        return load_settings("data=folder", "data.size=32", "data.shard_rows=5", f"data.root={tmp_path / 'xrays'}",
                             f"storage={tmp_path / 'runs'}", "name=run", *overrides)

    return compose


def run(settings) -> tuple[Stage, dict]:
    plan = Plan(settings)
    plan.begin("ingest", redo=False)
    record = plan.execute("ingest", Resources(2, 0, 2))
    return Plan(settings).stage("ingest", Resources(2, 0, 2)), record["metrics"]


def looked_at(settings) -> str:
    """The fingerprint of ingest, of what is there now."""
    return Plan(settings, ["ingest"]).fingerprint("ingest")


def rows(stage: Stage) -> list[dict]:
    return whole(stage.folder / "images").to_pylist()


def by_name(stage: Stage) -> dict[str, dict]:
    return {"/".join(row["uri"].split("/")[-2:]): row for row in rows(stage)}


def refused(stage: Stage) -> dict[str, str]:
    """Reason by file; every one once."""
    table = whole(stage.folder / "quarantine").to_pylist()
    found = {"/".join(row["uri"].split("/")[-2:]): row["reason"] for row in table}
    assert len(found) == len(table)
    return found


def test_a_bad_image_costs_one_row_of_quarantine(xrays, settings):
    xrays({name: content for name, (content, _) in BAD.items()})
    stage, metrics = run(settings("data.max_bad_fraction=0.5"))
    found = by_name(stage)
    assert len(found) == 24
    assert not set(found) & set(BAD)
    assert refused(stage) == {name: reason for name, (_, reason) in BAD.items()}
    assert (metrics["images"], metrics["quarantined"]) == (24, len(BAD))
    assert metrics["splits"] == {"train": 8, "val": 8, "test": 8}
    assert metrics["reasons"] == dict(Counter(reason for _, reason in BAD.values()))
    assert metrics["images_per_second"] > 0
    assert all(row["detail"] and row["stage"] == "ingest"
               for row in whole(stage.folder / "quarantine").to_pylist())
    assert all(row["split"] == name.split("/")[0] for name, row in found.items())
    assert {(row["width"], row["height"]) for row in found.values()} == {(36, 40)}
    assert decode_images(whole(stage.folder / "images")).shape == (24, 1, 32, 32)
    assert len({row["image_id"] for row in found.values()}) == 24


def test_patients_are_hashed_at_rest(xrays, settings):
    """Three patients in each split, and five who are in all three: these go to test whole."""
    xrays()
    stage, metrics = run(settings(r"data.patient_regex='(\w+/[abc])\.|/([d-h])\.'"))
    assert metrics["patients"] == 9 + 5
    assert metrics["splits"] == {"train": 3, "val": 3, "test": 18}
    found = by_name(stage)
    assert len({found[f"{split}/d.png"]["patient_id"] for split in ("train", "val", "test")}) == 1
    assert all(row["patient_id"].isalnum() and len(row["patient_id"]) == 16 for row in found.values())


def test_duplicates_keep_the_most_held_out_one(xrays, settings):
    xrays({"train/copy_of_test.png": png(200), "train/copy_of_val.png": png(100), "val/copy_of_test.png": png(201),
           "train/twin.png": png(0), "train/third.png": png(200)})
    stage, metrics = run(settings())
    found = by_name(stage)
    assert {"test/a.png", "test/b.png", "val/a.png", "train/a.png"} <= set(found)
    assert refused(stage) == dict.fromkeys(["train/copy_of_test.png", "train/copy_of_val.png", "val/copy_of_test.png",
                                            "train/twin.png", "train/third.png"], "duplicate")
    assert (metrics["images"], metrics["quarantined"]) == (24, 5)
    assert len({row["sha256"] for row in found.values()}) == 24, "no content is in two splits"


def test_people_under_two_names_are_in_one_split(xrays, settings):
    """p1, of train, shares a picture with a patient of test: the other image of p1 goes to test, too."""
    xrays({"train/p1_x.png": png(200), "train/p1_y.png": png(777)})
    stage, metrics = run(settings(r"data.patient_regex='(p\d)_|(\w+/[a-h])\.'"))
    found = by_name(stage)
    assert refused(stage) == {"train/p1_x.png": "duplicate"}
    assert found["train/p1_y.png"]["split"] == found["test/a.png"]["split"] == "test"
    assert metrics["splits"] == {"train": 8, "val": 8, "test": 9}


def test_without_deduplication_both_stay_with_names_of_their_own(xrays, settings):
    xrays({"train/twin.png": png(0), "val/twin.png": png(0)})
    stage, metrics = run(settings("data.deduplicate=false"))
    assert (metrics["images"], metrics["quarantined"]) == (26, 0)
    assert len({row["image_id"] for row in rows(stage)}) == 26
    assert len({row["sha256"] for row in rows(stage)}) == 24


def test_without_deduplication_people_under_two_names_are_in_one_split_too(xrays, settings):
    """p1, of train, shares a picture with a patient of test: all of p1 goes to test, and nothing is dropped."""
    xrays({"train/p1_x.png": png(200), "train/p1_y.png": png(777)})
    stage, metrics = run(settings(r"data.patient_regex='(p\d)_|(\w+/[a-h])\.'", "data.deduplicate=false"))
    assert {by_name(stage)[name]["split"] for name in ("train/p1_x.png", "train/p1_y.png", "test/a.png")} == {"test"}
    assert (metrics["images"], metrics["quarantined"]) == (26, 0)


def test_too_many_bad_images_stop_in_the_first_shards(xrays, settings):
    xrays({f"train/text{k}.png": b"no image" for k in range(4_000)})
    with pytest.raises(UserError, match=r"data\.max_bad_fraction=0\.2.*text\d+\.png"):
        run(settings("data.shard_rows=100"))
    assert len((Plan(settings()).folder / "ingest" / "images").names(".parquet")) < 30


def test_a_moved_root_and_a_stray_file_change_nothing_and_new_bytes_do(xrays, settings, tmp_path):
    """Moved in mid-ingest, with some shards committed: the manifest names files relative to the root."""
    root = xrays()
    stage, _ = run(settings())
    expected, fingerprint = [row["image_id"] for row in rows(stage)], looked_at(settings())
    stage.folder.remove("stage.json")
    (stage.folder / "images").remove("part-00001.parquet")
    moved = root.rename(tmp_path / "elsewhere")
    (moved / "notes.txt").write_text("of no concern")
    stage, _ = run(settings(f"data.root={moved}"))
    assert [row["image_id"] for row in rows(stage)] == expected
    assert looked_at(settings(f"data.root={moved}")) == fingerprint
    (moved / "train" / "a.png").write_bytes(png(5000) + b"longer")
    assert looked_at(settings(f"data.root={moved}")) != fingerprint


def test_headers_are_read_once_however_often_ingest_is_killed(tmp_path, monkeypatch):
    """Of three shards of headers the one that is missing is read again, and the others are not."""
    from pydicom.data import get_testdata_file

    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    dataset.Modality, dataset.SOPClassUID = "DX", "1.2.840.10008.5.1.4.1.1.1.1"
    (tmp_path / "pacs").mkdir()
    for k in range(6):
        dataset.PatientID = f"patient {k // 2}"
        dataset.save_as(tmp_path / "pacs" / f"{k}.dcm")
    (tmp_path / "pacs" / "notes").write_text("no DICOM")
    monkeypatch.setattr(headers, "ROWS", 3)
    data = load_settings("data=dicom", f"data.root={tmp_path / 'pacs'}", f"storage={tmp_path}").data
    out, salt = Folder(str(tmp_path / "manifest")), Salt("a secret")

    def described():
        headers.read_headers(out, headers.list_headers(out, list_images(data, 0)), data, salt)
        return read_columns(out / "headers", HASHED_MANIFEST.names)

    first = described()
    assert first["path"].to_pylist() == [f"{k}.dcm" for k in range(6)]
    assert first["patient_id"].to_pylist() == [salt.hash(f"patient {k // 2}") for k in range(6)]
    assert (out / "headers").names() == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    (out / "headers").remove("part-00001.parquet")
    for path in (tmp_path / "pacs").glob("[012].dcm"):
        path.write_bytes(b"read again")  # only one who reads would notice
    assert described().equals(first)


def test_an_interrupted_run_goes_on_to_the_same_end(xrays, settings, monkeypatch):
    """Killed anywhere: some shards missing, a half-written file aside, duplicates already moved."""
    xrays({"train/twin.png": png(0), "train/copy_of_test.png": png(200), "train/text.png": b"no image"})
    stage, _ = run(settings())
    whole, outcast = rows(stage), refused(stage)
    images = stage.folder / "images"
    for lost in (["part-00000.parquet"], ["part-00001.parquet", "part-00004.parquet"], images.names()):
        stage.folder.remove("stage.json")
        for name in lost:
            images.remove(name)
        with open(f"{images.uri}/.part-00001.parquet.0123.tmp", "wb") as file:
            file.write(b"PAR1 half")
        kept = {name: read_shard(images, name) for name in images.names()}
        again, metrics = run(settings())
        assert rows(again) == whole
        assert refused(again) == outcast
        assert (metrics["images"], metrics["quarantined"]) == (24, 3)
        assert all(read_shard(images, name).equals(shard) for name, shard in kept.items())


def test_a_run_killed_while_duplicates_move_goes_on_to_the_same_end(xrays, settings, monkeypatch):
    xrays({"train/twin.png": png(0), "train/copy_of_test.png": png(200), "val/copy_of_test.png": png(201)})
    stage, _ = run(settings())
    whole, outcast = rows(stage), refused(stage)
    def killed(*_, **__):
        raise KeyboardInterrupt

    for step in ("write_file", "run_shards"):  # before the copies are listed, and before they are taken out
        empty(stage.folder)
        with monkeypatch.context() as patch:
            patch.setattr(deduplicate, step, killed)
            with pytest.raises(KeyboardInterrupt):
                run(settings())
        again, _ = run(settings())
        assert rows(again) == whole
        assert refused(again) == outcast


def test_a_finished_run_reads_no_image_again(xrays, settings):
    root = xrays()
    first, _ = run(settings())
    before = rows(first)
    plan = Plan(settings())
    assert plan.is_done("ingest")
    shutil.copytree(root, root.with_name("kept"))
    for path in root.rglob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)  # of equal size: only one who reads would notice
    assert Plan(settings()).is_done("ingest")
    stage, metrics = run(settings())
    assert "images_per_second" not in metrics
    assert rows(stage) == before


def test_too_many_bad_images_stop_with_an_example(xrays, settings):
    xrays({f"train/text{k}.png": b"no image" for k in range(9)})
    with pytest.raises(ValueError, match=r"9 of 33 .*data\.max_bad_fraction=0\.2.*text\d\.png") as error:
        run(settings())
    assert "quarantine" in str(error.value)
    assert not Plan(settings()).is_done("ingest")


def test_duplicates_do_not_count_as_bad(xrays, settings):
    xrays({f"train/twin{k}.png": png(0) for k in range(20)})
    _, metrics = run(settings("data.max_bad_fraction=0"))
    assert metrics["reasons"] == {"duplicate": 20}


def test_a_split_without_usable_images_is_named(xrays, settings, capsys):
    xrays({f"val/{name}.png": b"no image" for name in "abcdefgh"})
    _, metrics = run(settings("data.max_bad_fraction=1"))
    assert "no usable image is left for val" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no usable image for val"):
        check_filled(metrics["splits"])


def test_nothing_usable_at_all_is_an_error(xrays, settings):
    xrays({f"{split}/{name}.png": b"no image" for split in ("train", "val", "test") for name in "abcdefgh"})
    with pytest.raises(ValueError, match="none of the 24 images is usable"):
        run(settings("data.max_bad_fraction=1"))


def test_dicom_and_pictures_mix(xrays, settings):
    from pydicom.data import get_testdata_file

    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    dataset.Modality, dataset.SOPClassUID = "DX", "1.2.840.10008.5.1.4.1.1.1.1"
    root = xrays()
    dataset.save_as(root / "train" / "dx.dcm")
    stage, _ = run(settings())
    found = by_name(stage)["train/dx.dcm"]
    assert (found["width"], found["height"]) == (dataset.Columns, dataset.Rows)


def test_the_phantom_is_split_by_patient_and_comes_out_alike_every_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYOGRAPH_SALT", "of both storages")
    stage, metrics = run(tiny())
    found = rows(stage)
    assert metrics["images"] == len(found) == 160
    places: dict[str, set[str]] = {}
    for row in found:
        places.setdefault(row["patient_id"], set()).add(row["split"])
    assert len(places) == metrics["patients"] < 160, "some patients have several images"
    assert all(len(splits) == 1 for splits in places.values())
    assert set.union(*places.values()) == {"train", "val", "test"}
    again, _ = run(tiny(f"storage={tmp_path / 'again'}"))
    assert rows(again) == found
    other, _ = run(tiny(f"storage={tmp_path / 'other'}", "seed=1"))
    assert not {row["image_id"] for row in rows(other)} & {row["image_id"] for row in found}


def test_hugging_face_datasets_opens_the_shards(xrays, settings, tmp_path):
    datasets = pytest.importorskip("datasets")
    xrays({"train/text.png": b"no image"})
    stage, _ = run(settings())
    data = datasets.load_dataset("parquet", data_files=f"{stage.folder.uri}/images/*.parquet", split="train",
                                 cache_dir=str(tmp_path / "cache"))
    assert data.num_rows == 24
    assert isinstance(data.features["image"], datasets.Image)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in data["image"]])[:, None],
                                  decode_images(whole(stage.folder / "images")))
    assert data[0]["labels"] == []
    assert data[0]["split"] in ("train", "val", "test")
