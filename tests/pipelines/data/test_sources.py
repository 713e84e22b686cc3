"""Every source by its config, and the first of them by its owner's layout."""

from pathlib import Path

import pytest

import pipelines
from pipelines.data.listing import list_images
from pipelines.data.public_set import Tree, read_csv
from pipelines.data.settings import DataSettings
from pipelines.data.sources import find_source, nih_cxr14
from pipelines.graph.compose import load_settings

CONFIGS = sorted(path.stem for path in (Path(pipelines.__file__).parent / "conf" / "data").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_composed_without_the_data_and_names_a_source(name):
    settings = load_settings(f"data={name}").data
    assert settings.source == name.replace("-", "_")
    source = find_source(settings.source)
    assert all(callable(getattr(source, part)) for part in ("manifest", "load"))


@pytest.fixture
def nih(tmp_path):
    (tmp_path / "images_001" / "images").mkdir(parents=True)
    for name in ("00000001_000.png", "00000001_001.png", "00000002_000.png"):
        (tmp_path / "images_001" / "images" / name).write_bytes(b"xx")
    (tmp_path / "test_list.txt").write_text("00000002_000.png\n00000009_000.png\n")
    (tmp_path / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        "00000001_000.png,Cardiomegaly,0,1,058Y,M,PA,2682,2749,0.143,0.143,\n"
        "00000001_001.png,Cardiomegaly|Emphysema,1,1,058Y,M,AP,2894,2729,0.143,0.143,\n"
        "00000002_000.png,No Finding,0,2,081Y,M,PA,2500,2048,0.171,0.171,\n"
        "00000009_000.png,Hernia,0,9,081Y,M,PA,2500,2048,0.171,0.171,\n")
    return tmp_path


def test_nih_chest_xray14(nih):
    rows = nih_cxr14.SOURCE.manifest(DataSettings(root=str(nih)), 0).to_pylist()
    assert [(r["path"], r["patient_id"], r["study_id"], r["view"], r["labels"], r["split"]) for r in rows] == [
        ("images_001/images/00000001_000.png", "1", "1-0", "PA", ["Cardiomegaly"], "train"),
        ("images_001/images/00000001_001.png", "1", "1-1", "AP", ["Cardiomegaly", "Emphysema"], "train"),
        ("images_001/images/00000002_000.png", "2", "2-0", "PA", ["No Finding"], "test"),
    ]
    assert all(row["source"] == "nih_cxr14" for row in rows)


@pytest.mark.parametrize("gone", ["test_list.txt", "Data_Entry_2017.csv", "images_001"])
def test_what_is_missing_is_named_with_where_it_is_given_out(nih, gone):
    (nih / gone).rename(nih.parent / gone)
    with pytest.raises(ValueError, match=r"NIH ChestX-ray14.*nihcc") as missing:
        nih_cxr14.SOURCE.manifest(DataSettings(root=str(nih)), 0)
    assert ("image" if gone == "images_001" else gone) in str(missing.value)


def test_a_missing_column_is_named(nih):
    (nih / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels\n00000001_000.png,Hernia\n")
    with pytest.raises(ValueError, match=r"Data_Entry_2017\.csv has no column 'Patient ID'"):
        nih_cxr14.SOURCE.manifest(DataSettings(root=str(nih)), 0)


def test_a_draw_is_the_same_whatever_else_there_is(nih):
    def draw(images):
        return list_images(DataSettings(source="nih_cxr14", root=str(nih), images=images), 0)["path"].to_pylist()

    drawn = draw(2)
    assert len(drawn) == 2
    (nih / "images_001" / "images" / "00000009_000.png").write_bytes(b"xx")
    assert not set(drawn) - set(draw(3))


def test_cells_are_texts(tmp_path):
    table = read_csv(b"a,b\n001,\n2,x\n")
    assert table.to_pylist() == [{"a": "001", "b": ""}, {"a": "2", "b": "x"}]
    (tmp_path / "t.csv").write_bytes(b"a,b\n1\n")
    with pytest.raises(ValueError, match=r"t\.csv is no table"):
        list(Tree(str(tmp_path), nih_cxr14.CARD).table("t.csv"))


def test_a_source_of_another_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "hospital.py").write_text("def manifest(settings, seed): return 'its rows'\n")
    about = tmp_path / "hospital-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hospital\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rayograph.sources]\nour-films = hospital\n")
    monkeypatch.syspath_prepend(tmp_path)
    find_source.cache_clear()
    assert find_source("our-films").manifest(None, 0) == "its rows"
    mixed = load_settings("data=mix", "data.sets={our-films: {root: /x}}").data
    assert [part.source for _, part in find_source("mix")._parts(mixed)] == ["our-films"]
    find_source.cache_clear()


def test_a_data_set_of_the_hub_keeps_its_name(tmp_path):
    settings = load_settings("data=huggingface", "data.root=owner/name", f"storage={tmp_path}")
    assert settings.data.root == "owner/name"


def test_a_folder_laid_out_as_on_the_hub_is_found_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets.yaml").write_text("hub: {source: huggingface, root: owner/name}\n")
    settings = load_settings("data=huggingface", "data.root=owner/name", "storage=/x").data
    assert settings.root == f"{tmp_path}/owner/name"
    settings = load_settings("data=mix", f"data.sets={tmp_path}/sets.yaml", "storage=/x").data
    assert settings.sets["hub"]["root"] == f"{tmp_path}/owner/name"
