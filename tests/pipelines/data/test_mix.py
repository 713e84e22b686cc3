import io

import numpy as np
import pytest
from PIL import Image

from pipelines.data.listing import list_images, listing_hash
from pipelines.data.sources import cards_of, find_source
from pipelines.data.sources.cxr_868k import SETS
from pipelines.graph.compose import load_settings
from pipelines.graph.fields import outcome_settings


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """Montgomery with a mask, Shenzhen and Kermany; the first two know a patient 1 each."""
    files = {
        "montgomery/MontgomerySet/CXR_png/MCUCXR_0001_0.png": png(0),
        "montgomery/MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png": png(1),
        "shenzhen/ChinaSet_AllFiles/CXR_png/CHNCXR_0001_1.png": png(2),
        "kermany/chest_xray/train/NORMAL/IM-0001-0001.png": png(3),
        "kermany/chest_xray/test/PNEUMONIA/person1_virus_2.png": png(4),
    }
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return tmp_path


def settings(root, *overrides):
    return load_settings("data=cxr-868k", f"data.root={root}", "data.size=32", *overrides).data


def test_sets_are_one_set_with_patients_of_their_own(root):
    chosen = settings(root, "data.sets=[montgomery,shenzhen,kermany]")
    source = find_source(chosen.source)
    rows = source.manifest(chosen, 0).to_pylist()
    assert sorted(row["source"] for row in rows) == ["kermany", "kermany", "montgomery", "shenzhen"]
    assert all(row["patient_id"].startswith(f"{row['source']}/") for row in rows)
    for row in rows:
        loaded = source.load(row, chosen)
        assert loaded.image.shape == (32, 32)
        assert (loaded.mask is not None) == (row["source"] == "montgomery")
    assert list_images(settings(root, "data.sets=[montgomery,shenzhen,kermany]", "data.images=2"), 0).num_rows == 2
    before = listing_hash(list_images(chosen, 0))
    (root / "kermany/chest_xray/train/NORMAL/IM-0009-0001.png").write_bytes(png(9))
    assert listing_hash(list_images(chosen, 0)) != before


def test_every_missing_set_is_named_with_its_owner(root):
    with pytest.raises(ValueError, match="not whole") as error:
        find_source("cxr_868k").manifest(settings(root), 0)
    for name in set(SETS) - {"montgomery", "shenzhen", "kermany"}:
        assert f"- {name} (" in str(error.value)
        assert find_source(name.replace("-", "_")).card.where in str(error.value)
    assert "- kermany" not in str(error.value)


def test_unknown_sets_and_no_root_are_told():
    with pytest.raises(ValueError, match="chexpret"):
        find_source("cxr_868k").manifest(settings("/x", "data.sets=[chexpret]"), 0)
    with pytest.raises(ValueError, match=r"data\.root"):
        find_source("cxr_868k").manifest(load_settings("data=cxr-868k").data, 0)


def test_the_mix_holds_868_000_images_though_covidx_were_all_duplicates():
    images = {name: find_source(name.replace("-", "_")).card.images for name in SETS}
    assert sum(images.values()) - images["covidx-cxr4"] >= 868_000


def test_the_page_on_data_tells_what_the_cards_tell():
    from pathlib import Path

    page = (Path(find_source.__wrapped__.__code__.co_filename).parents[1] / "README.md").read_text()
    for name in SETS:
        card = find_source(name.replace("-", "_")).card
        assert f"| [{name}]({card.where.split(' ')[0]}) | {card.images:,} |" in page
    assert f"| {sum(find_source(n.replace('-', '_')).card.images for n in SETS):,} |" in page


def test_sets_of_a_mix_have_roots_and_options_of_their_own(root):
    """One below data.root, one elsewhere under another name and source; moving either changes nothing."""
    def mixed(elsewhere):
        sets = f"{{kermany: null, ours: {{source: folder, root: {elsewhere}, patient_regex: 'p(\\d+)'}}}}"
        return load_settings("data=mix", f"data.root={root}", f"data.sets={sets}", "data.size=32")

    (root / "other" / "NORMAL").mkdir(parents=True)
    for name in ("p1-a.png", "p1-b.png", "p2-a.png"):
        (root / "other" / "NORMAL" / name).write_bytes(png(len(name)))
    chosen = mixed(root / "other")
    rows = list_images(chosen.data, 0).to_pylist()
    assert {(row["source"], row["patient_id"]) for row in rows} == {
        ("kermany", "kermany/IM-0001"), ("kermany", "kermany/person1_virus"), ("ours", "ours/1"), ("ours", "ours/2")}
    before, outcome = listing_hash(list_images(chosen.data, 0)), outcome_settings(chosen.data)
    (root / "sets.yaml").write_text(
        "kermany:\nours:\n  source: folder\n  root: other\n  patient_regex: 'p(\\d+)'\n")
    assert load_settings("data=mix", f"data.root={root}", f"data.sets={root}/sets.yaml").data.sets == chosen.data.sets
    (root / "other").rename(root / "moved")
    moved = mixed(root / "moved")
    assert (listing_hash(list_images(moved.data, 0)), outcome_settings(moved.data)) == (before, outcome)
    assert all(find_source("mix").load(row, moved.data).image.shape == (32, 32) for row in rows)


@pytest.mark.parametrize(("sets", "match"), [
    ("{ours: {source: folder, rot: /x}}", r"data\.sets\.ours='rot'.*root"), ("[a b]", "'a b'"),
    ("{a-b: {root: /x}, a_b: {root: /y}}", r"data\.sets='a_b': is the same name as 'a-b'"),
    ("{ours: 3}", r"data\.sets\.ours=3"), ("3", r"data\.sets=3"), ("/no/such.yaml", r"/no/such\.yaml"),
])
def test_sets_that_are_none_are_told(sets, match):
    with pytest.raises(ValueError, match=match):
        load_settings("data=mix", f"data.sets={sets}")


def test_a_mix_needs_sets_and_none_of_them_is_a_mix():
    with pytest.raises(ValueError, match=r"data=mix needs data\.sets"):
        find_source("mix").manifest(load_settings("data=mix").data, 0)
    with pytest.raises(ValueError, match="mix itself"):
        find_source("mix").manifest(load_settings("data=mix", "data.sets={cxr-868k: {root: /x}}").data, 0)


def test_results_lie_in_no_root_of_a_mix(tmp_path):
    with pytest.raises(ValueError, match="overlap"):
        load_settings("data=mix", f"data.sets={{jsrt: {{root: {tmp_path}/runs}}}}", f"storage={tmp_path}/runs")


NIH_AND_RSNA = {
    "nih-cxr14/00000013_000.png": b"x", "nih-cxr14/test_list.txt": "",
    "nih-cxr14/Data_Entry_2017.csv": "Image Index,Finding Labels,Follow-up #,Patient ID,View Position\n"
                                     "00000013_000.png,Mass,0,13,PA\n",
    "rsna-pneumonia/stage_2_train_images/abc.dcm": b"x", "rsna-pneumonia/stage_2_train_images/unmapped.dcm": b"x",
    "rsna-pneumonia/stage_2_detailed_class_info.csv": "patientId,class\nabc,Normal\nunmapped,Normal\n",
    "rsna-pneumonia/pneumonia-challenge-dataset-mappings_2018.json":
        '[{"subset_img_id": "abc", "img_id": "00000013_000.png"}]',
}


def fill(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_people_of_films_that_two_sets_share_are_one_patient(tmp_path):
    """NIH's numbers in the RSNA's list, the RSNA's and BIMCV's names in COVIDx's, MIMIC-CXR's in both forms."""
    fill(tmp_path, {
        **NIH_AND_RSNA,
        "covidx-cxr4/train/1.png": b"x", "covidx-cxr4/train/2.png": b"x", "covidx-cxr4/train/3.png": b"x",
        "covidx-cxr4/train.txt": "unmapped 1.png negative rsna\nsub-S1 2.png positive bimcv\n5 3.png negative cohen\n",
        "bimcv-covid19/covid19_posi/sub-S1/ses-E1/mod-rx/sub-S1_ses-E1_run-1_bp-chest_vp-pa_cr.png": b"x",
        "bimcv-covid19/covid19_posi/derivatives/labels/labels.tsv": "ReportID\tLabels\nses-E1\t['normal']\n",
    })
    chosen = settings(tmp_path, "data.sets=[nih-cxr14,rsna-pneumonia,covidx-cxr4,bimcv-covid19]")
    rows = list_images(chosen, 0).to_pylist()
    assert {row["path"].rpartition("/")[2]: row["patient_id"] for row in rows} == {
        "00000013_000.png": "nih-cxr14/13", "abc.dcm": "nih-cxr14/13",
        "unmapped.dcm": "rsna-pneumonia/unmapped", "1.png": "rsna-pneumonia/unmapped",
        "2.png": "bimcv-covid19/sub-S1", "sub-S1_ses-E1_run-1_bp-chest_vp-pa_cr.png": "bimcv-covid19/sub-S1",
        "3.png": "covidx-cxr4/5"}


@pytest.mark.parametrize(("nih", "rsna"), [("nih", "rsna"), ("nih-cxr14", "rsna-pneumonia"), ("a_b", "other")])
def test_who_is_who_does_not_depend_on_what_the_sets_are_called(tmp_path, nih, rsna):
    """And sources are found by the names of the page on data, too."""
    fill(tmp_path, NIH_AND_RSNA)
    chosen = load_settings("data=mix", f"data.sets={{{nih}: {{source: nih-cxr14, root: {tmp_path}/nih-cxr14}}, "
                                       f"{rsna}: {{source: rsna_pneumonia, root: {tmp_path}/rsna-pneumonia}}}}").data
    rows = list_images(chosen, 0).to_pylist()
    assert {row["path"].rpartition("/")[2]: row["patient_id"] for row in rows} == {
        "00000013_000.png": f"{nih}/13", "abc.dcm": f"{nih}/13", "unmapped.dcm": f"{rsna}/unmapped"}
    assert set(cards_of(chosen)) == {nih.replace("-", "_"), rsna.replace("-", "_")}
