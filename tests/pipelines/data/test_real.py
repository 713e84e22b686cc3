"""Real sets, ingested as a user would: every file is an image or a row of quarantine with a good reason."""

import io

import numpy as np
import pytest
from conftest import whole
from PIL import Image

from cluster.session import Resources
from pipelines.data.structures import STRUCTURES
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.graph.stage import run_folder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def ingested(real_data, tmp_path):
    """Rows of images and of quarantine."""

    def ingest(name: str, *overrides: str) -> tuple[list[dict], list[dict]]:
        settings = load_settings(f"data={name}", f"data.root={real_data(name)}", "data.size=64", "data.shard_rows=64",
                                 f"storage={tmp_path}", "name=run", *overrides)
        plan = Plan(settings)
        plan.begin("ingest", redo=False)
        metrics = plan.execute("ingest", Resources(2, 0, 2))["metrics"]
        folder = run_folder(settings) / "ingest"
        images = whole(folder / "images").to_pylist()
        refused = whole(folder / "quarantine").to_pylist() if (folder / "quarantine").names() else []
        assert (len(images), len(refused)) == (metrics["images"], metrics["quarantined"])
        return images, refused

    return ingest


def values(mask: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(mask["bytes"])))


def test_jsrt_with_its_masks(ingested, real_data):
    images, refused = ingested("jsrt")
    assert len(images) == len(list(real_data("jsrt").glob("images/*"))) == 186
    assert refused == []
    for row in images:
        mask, film = values(row["mask"]), values(row["image"])
        assert set(np.unique(mask)) == {0, 1, 2, 3}
        share = [(mask == k).mean() for k in range(4)]
        assert 0.03 < share[3] < 0.25, "heart"
        assert 0.15 < share[1] + share[2] < 0.6, "lungs"
        assert film[(mask == 1) | (mask == 2)].mean() < film[mask == 3].mean(), "lungs are darker than the heart"
        assert np.argwhere(mask == 1)[:, 1].mean() > np.argwhere(mask == 2)[:, 1].mean(), "the left one is on the right"


def test_polyps_with_their_masks(ingested, real_data):
    images, refused = ingested("kvasir-seg")
    assert len(images) + len(refused) == len(list(real_data("kvasir-seg").glob("*/images/*.jpg"))) == 900
    assert {row["reason"] for row in refused} <= {"duplicate"}
    assert len(refused) < 5
    assert all(set(np.unique(values(row["mask"]))) <= {0, STRUCTURES["polyp"]} for row in images)
    assert np.mean([values(row["mask"]).any() for row in images]) > 0.99


def test_a_tree_of_dicom_files(ingested, real_data):
    """The four encodings of RG1 are one picture; MR and CT are no radiographs, and an extremity is no chest."""
    images, refused = ingested("dicom")
    reasons = {row["uri"].rsplit("/", 1)[-1]: row["reason"] for row in refused}
    kept = {row["uri"].rsplit("/", 1)[-1] for row in images}
    assert len(images) + len(refused) == len(list(real_data("dicom").glob("*.dcm")))
    assert reasons["bad_sequence.dcm"] == "not_a_radiograph"
    assert reasons["emri_small_jpeg_2k_lossless_too_short.dcm"] == "not_a_radiograph"
    assert reasons["RG3_J2KI.dcm"] == "not_a_chest"
    assert len([name for name in kept if name.startswith("RG1")]) == 1
    assert all(row["detail"] for row in refused)
    assert "NIH_DX.dcm" in kept
    assert len({"mlut_18.dcm", "vlut_04.dcm"} & kept) == 1, "they show the same, and the salt tells which is held out"
    for row in images:
        assert "9RG1" not in str({key: value for key, value in row.items() if key not in ("uri", "image")})
