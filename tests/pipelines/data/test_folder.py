import io

import numpy as np
import pytest
from PIL import Image

from cluster import faults
from cluster.errors import UserError
from pipelines.data.image.picture import Refused
from pipelines.data.listing import list_images, listing_hash
from pipelines.data.sources import find_source, folder
from pipelines.graph.compose import load_settings


@pytest.fixture
def make(tmp_path):
    """Settings of a folder that holds these files (of two bytes each; a manifest opens none)."""

    def fill(*paths: str, **values):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(b"xx")
        settings = load_settings("data=folder", f"data.root='{tmp_path}'").data
        for name, value in values.items():
            setattr(settings, name, value)
        return settings

    return fill


def places(settings):
    table = list_images(settings, 0)
    return {row["path"]: (row["split"], row["labels"]) for row in table.to_pylist()}


def contents(settings):
    return listing_hash(list_images(settings, 0))


def patients(settings):
    return {row["path"]: row["patient_id"] for row in folder.manifest(settings, 0).to_pylist()}


def test_split_folders_with_classes(make):
    assert places(make("train/NORMAL/a.png", "val/PNEUMONIA/b.jpeg", "test/NORMAL/c.dcm")) == {
        "train/NORMAL/a.png": ("train", ["No Finding"]),
        "val/PNEUMONIA/b.jpeg": ("val", ["Pneumonia"]),
        "test/NORMAL/c.dcm": ("test", ["No Finding"]),
    }


def test_class_folders_only(make):
    assert places(make("sick/a.png", "well/a.png")) == {"sick/a.png": (None, ["sick"]), "well/a.png": (None, ["well"])}


def test_folders_named_after_patients_are_no_findings(make):
    paths = [f"train/patient{k}/{film}.png" for k in range(30) for film in "ab"]
    with pytest.raises(UserError, match=r"30 folders of 60 images.*data\.patient_regex"):
        places(make(*paths))
    settings = make(*paths, patient_regex=r"([^/]+)/[^/]+$")
    assert places(settings) == {path: ("train", []) for path in paths}
    assert set(patients(settings).values()) == {f"patient{k}" for k in range(30)}
    assert places(make("sick/a.png", "well/a.png", patient_regex=r"(\w)\.png"))["sick/a.png"][1] == ["sick"]


def test_no_folders_split_folders_only_and_all_mixed(make):
    assert places(make("a.png", "train/b.png", "sick/c.png", "test/sick/d.png")) == {
        "a.png": (None, []), "train/b.png": ("train", []), "sick/c.png": (None, ["sick"]),
        "test/sick/d.png": ("test", ["sick"]),
    }


@pytest.mark.parametrize(("name", "split"), [("Train", "train"), ("training", "train"), ("valid", "val"),
                                             ("validation", "val"), ("TEST", "test"), ("testing", "test")])
def test_other_names_of_splits(make, name, split):
    assert places(make(f"{name}/sick/a.png")) == {f"{name}/sick/a.png": (split, ["sick"])}


def test_other_files_and_hidden_ones_are_left_out(make):
    settings = make("a.png", "b.PNG", "c.JPeG", "d.dicom", "e.tiff", ".f.png", "._g.png", ".cache/h.png",
                    "sick/.trash/i.png", "labels.csv", "README", "j.png.part")
    assert sorted(places(settings)) == ["a.png", "b.PNG", "c.JPeG", "d.dicom", "e.tiff"]


def test_strange_names_are_read(make):
    names = ["with space.png", "ünï.png", "100%20#?.png", "quote'.png", "a=b,{c}.png"]
    settings = make(*names)
    table = folder.manifest(settings, 0).to_pylist()
    assert sorted(row["path"] for row in table) == sorted(names)
    for row in table:
        with pytest.raises(Refused) as refused:
            folder.load(row, settings)
        assert refused.value.reason == "not_an_image", "the file is found and opened"


def test_a_name_that_is_not_utf8_is_told(make, tmp_path):
    settings = make("a.png")
    try:
        with open(bytes(tmp_path) + b"/\xff.png", "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(ValueError, match=str(tmp_path)):
        folder.manifest(settings, 0)


@pytest.mark.parametrize(("regex", "expected"), [
    (r"person(\d+)", {"person1_a.png": "1", "person1_b.png": "1", "person22_a.png": "22"}),
    (r"person\d+", {"person1_a.png": "person1", "person1_b.png": "person1", "person22_a.png": "person22"}),
    (r"(person)(\d+)", {"person1_a.png": "person-1", "person1_b.png": "person-1", "person22_a.png": "person-22"}),
    (r"person(\d+)|other(\d+)", {"person1_a.png": "1", "person1_b.png": "1", "person22_a.png": "22"}),
])
def test_patients_by_regex(make, regex, expected):
    assert patients(make(*expected, patient_regex=regex)) == expected


def test_the_regex_sees_folders_too(make):
    settings = make("patient1/a.png", "patient1/b.png", "patient2/a.png", patient_regex=r"^([^/]+)/")
    assert sorted(patients(settings).values()) == ["patient1", "patient1", "patient2"]


def test_paths_that_the_regex_misses_are_patients_of_their_own_and_told(make, capsys):
    settings = make("person1_a.png", "person1_b.png", "odd.png", "odder.png", patient_regex=r"person(\d+)")
    assert patients(settings) == {"person1_a.png": "1", "person1_b.png": "1", "odd.png": "odd.png",
                                  "odder.png": "odder.png"}
    told = capsys.readouterr().err
    assert "2 paths" in told
    assert "odd.png" in told


def test_a_regex_that_fits_nothing_is_refused(make):
    with pytest.raises(ValueError, match=r"data\.patient_regex.*zzz.*a\.png"):
        folder.manifest(make("a.png", patient_regex="zzz"), 0)


def test_without_a_regex_each_image_is_a_patient_and_that_is_told(make, capsys):
    assert len(set(patients(make("a/x.png", "b/x.png")).values())) == 2
    assert "data.patient_regex" in capsys.readouterr().err


@pytest.mark.parametrize("paths", [[], ["labels.csv", ".hidden.png"]])
@pytest.mark.parametrize("call", [contents, lambda settings: folder.manifest(settings, 0)])
def test_a_folder_without_images_is_named(make, tmp_path, paths, call):
    with pytest.raises(ValueError, match=str(tmp_path)):
        call(make(*paths))


@pytest.mark.parametrize("root", ["nowhere", "a.png"])
def test_a_root_that_is_no_folder_is_named(make, tmp_path, root):
    settings = make("a.png")
    settings.root = str(tmp_path / root)
    with pytest.raises(ValueError, match=str(tmp_path / root)):
        contents(settings)


@pytest.mark.parametrize("root", [None, ""])
def test_no_root_is_told(make, root):
    with pytest.raises(ValueError, match=r"data\.root"):
        contents(make("a.png", root=root))


def test_contents_change_with_the_files(make, tmp_path):
    settings = make("a.png", "sick/b.png")
    seen = [contents(settings)]
    assert contents(settings) == seen[0]
    make("labels.csv", ".c.png")
    assert contents(settings) == seen[0], "what is not read does not count"
    for change in (lambda: make("c.png"), lambda: (tmp_path / "a.png").write_bytes(b"longer"),
                   lambda: (tmp_path / "a.png").rename(tmp_path / "z.png"), lambda: (tmp_path / "c.png").unlink()):
        change()
        seen.append(contents(settings))
    assert len(set(seen)) == len(seen)


def test_contents_do_not_depend_on_where_the_folder_lies(make, tmp_path):
    settings = make("x/a.png", "y/a.png")
    found = []
    for name in "xy":
        settings.root = str(tmp_path / name)
        found.append(contents(settings))
    assert found[0] == found[1]


def test_a_part_of_the_images_is_drawn_from_all_folders(make):
    paths = [f"{split}/sick/{k}.png" for split in ("test", "train", "val") for k in range(40)]

    part = places(make(*paths, images=30))
    assert len(part) == 30
    assert {split for split, _ in part.values()} == {"train", "val", "test"}
    assert set(part) <= set(places(make(*paths, images=60))), "more of them hold the fewer"
    assert len(places(make(*paths, images=10_000))) == 120


def test_images_are_loaded_and_what_cannot_be_is_refused(make, tmp_path, monkeypatch):
    settings = make("a.png", "b.png")
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1024, dtype=np.uint16).astype(np.uint8).reshape(32, 32)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    monkeypatch.setattr(faults, "BACKOFF_SECONDS", ())
    assert folder.load({"path": "a.png"}, settings).width == 32
    with pytest.raises(Refused):
        folder.load({"path": "b.png"}, settings)
    with pytest.raises(UserError, match="gone"):
        folder.load({"path": "gone.png"}, settings)


def test_sources_are_found_by_name():
    assert find_source("folder") is folder
    with pytest.raises(ValueError, match=r"nowhere.*folder, .*phantom"):
        find_source("nowhere")


def test_the_real_set_has_its_official_split(real_data):
    root = real_data("kermany")
    settings = load_settings("data=folder", f"data.root='{root}'").data
    settings.patient_regex = r"(person\d+_(?:bacteria|virus)|IM-\d+)"
    found = folder.manifest(settings, 0).to_pylist()
    count = {name: sum(row["split"] == name for row in found) for name in ("train", "val", "test")}
    assert count == {"train": 4421, "val": 308, "test": 503}
    assert {label for row in found for label in row["labels"]} == {"No Finding", "Pneumonia"}
