import io

import numpy as np
import pytest
from PIL import Image

from pipelines.data.listing import list_images, listing_hash
from pipelines.data.sources import find_source
from pipelines.data.sources.cxr_868k import SETS
from pipelines.graph.compose import load_settings


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
    assert source.manifest(settings(root, "data.sets=[montgomery,shenzhen,kermany]", "data.images=2"), 0).num_rows == 2
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
