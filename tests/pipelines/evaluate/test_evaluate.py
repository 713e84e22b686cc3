"""The evaluate stage on small tables of smooth random images and an untrained encoder."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import empty
from PIL import Image
from scipy.ndimage import gaussian_filter

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.evaluate import stage as evaluate
from pipelines.evaluate.features import EmbeddingTable, extract
from pipelines.generator.encoder.vit import embed, load_encoder
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.graph.plan import Plan
from pipelines.learning.weights import save_model
from pipelines.report import plots
from pipelines.tables.images import encode_png, images_by_id
from pipelines.tables.parquet import write_shard
from pipelines.tables.schemas import CORPUS, IMAGES

OPTIONS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLOORED = ("frechet", "precision", "recall", "density", "coverage", "ms_ssim")
PICTURES = ["embedding.png", "nearest.png"]


def draw(n: int, seed: int) -> np.ndarray:
    """uint8 (n, 32, 32), all of one distribution."""
    noise = np.random.default_rng(seed).normal(size=(n, 32, 32))
    return np.clip(128 + 400 * gaussian_filter(noise, (0, 4, 4)), 0, 255).astype(np.uint8)


def rows(images: np.ndarray, name: str, **values) -> list[dict]:
    return [{"image_id": f"{name}{k}", "image": encode_png(image), **values} for k, image in enumerate(images)]


def write_latents(folder: Folder, model: Encoder, splits: dict[str, np.ndarray]) -> None:
    """The columns of the latents table that the stage reads."""
    table = [pa.table({
        "image_id": [f"{split}{k}" for k in range(len(images))],
        "embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(embed(model, images[:, None], 32).half().numpy()),
        "source": ["rare" if k < len(images) // 20 else "common" for k in range(len(images))],
        "split": [split] * len(images),
    }) for split, images in splits.items()]
    write_shard(folder, 0, pa.concat_tables(table))


TRAIN, TEST, FRESH = draw(120, 0), draw(60, 1), draw(60, 2)


@pytest.fixture
def measure(tiny, monkeypatch):
    """Run the stage in this process on a corpus; returns its metrics and its folder."""
    monkeypatch.setattr(evaluate, "run_on_accelerator", lambda resources, function, *arguments: function(*arguments))

    def run(corpus: np.ndarray, *overrides: str, test: np.ndarray = TEST):
        settings = tiny(*overrides)
        stage = Plan(settings).stage("evaluate", Resources(2, 0, 2))
        for folder in (stage.input("ingest") / "images", stage.folder / "embeddings"):
            empty(folder)
        images = rows(TRAIN, "train", split="train") + rows(test, "test", split="test")
        for index in range(0, len(images), 50):
            write_shard(stage.input("ingest") / "images", index // 50,
                        pa.Table.from_pylist(images[index : index + 50], schema=IMAGES))
        write_shard(stage.input("sample") / "corpus", 0, pa.Table.from_pylist(rows(corpus, "made"), schema=CORPUS))
        torch.manual_seed(0)
        model = Encoder(image_size=32, options=OPTIONS).eval()
        save_model(stage.input("encoder"), model)
        write_latents(stage.input("latents"), model, {"train": TRAIN, "test": test})
        stage.input("encoder").write_json("stage.json", {"metrics": {"weights": "untrained", "dim": 32}})
        return evaluate.evaluate(stage), stage.folder

    return run


def test_images_of_the_same_distribution_score_near_the_floor(measure):
    metrics, folder = measure(FRESH)
    assert metrics["frechet"] < 2 * metrics["frechet_floor"]
    for name in ("precision", "recall", "coverage", "ms_ssim"):
        assert metrics[name] == pytest.approx(metrics[f"{name}_floor"], abs=0.2)
    assert metrics["nearest_median"] == pytest.approx(metrics["nearest_floor_median"], rel=0.2)
    assert metrics["copies"] < 0.15
    assert folder.names(".png") == PICTURES


def test_other_images_score_far_from_the_floor(measure):
    metrics, _ = measure(255 - np.repeat(FRESH[:2], 30, 0) // 3)
    assert metrics["frechet"] > 10 * metrics["frechet_floor"]
    assert metrics["recall"] < metrics["recall_floor"] - 0.3
    assert metrics["ms_ssim"] > metrics["ms_ssim_floor"] + 0.2


def test_noisy_images_have_too_much_fine_detail(measure):
    metrics, _ = measure(FRESH)
    noise = np.random.default_rng(0).normal(0, 3, FRESH.shape)
    noisy, _ = measure(np.clip(FRESH + noise, 0, 255).astype(np.uint8))
    assert metrics["detail"] == pytest.approx(metrics["detail_floor"], abs=1)
    assert noisy["detail"] > metrics["detail"] + 3
    assert noisy["spectrum_error"] > metrics["spectrum_error"] + 3


def test_copies_of_training_images_are_detected(measure):
    fresh, _ = measure(FRESH)
    metrics, _ = measure(np.concatenate([FRESH[:30], TRAIN[:30]]))
    assert metrics["copies"] >= 0.5 > fresh["copies"] + 0.3
    assert metrics["nearest_median"] < metrics["nearest_floor_median"] / 2


def test_the_measurement_is_named_and_repeatable(measure):
    metrics, _ = measure(FRESH)
    assert metrics["extractor"] == "this run's encoder (untrained; 32-d)"
    assert (metrics["dim"], metrics["n"], metrics["reference"], metrics["nearest_checked"]) == (32, 40, "test", 60)
    assert {*FLOORED, *(f"{name}_floor" for name in FLOORED)} <= metrics.keys()
    assert "absent" not in metrics
    assert measure(FRESH)[0] == metrics


def test_n_is_the_size_of_the_smallest_set(measure):
    assert measure(FRESH[:25])[0]["n"] == 25
    assert measure(FRESH, "evaluate.images=1000", test=TEST[:30])[0]["n"] == 30


def test_figures_that_too_few_images_forbid_are_absent_and_said(measure, capsys):
    metrics, folder = measure(FRESH[:4])
    assert metrics["frechet"] > 0
    assert not {"precision", "recall", "density", "coverage", "precision_floor"} & metrics.keys()
    assert "copies" in metrics
    assert "evaluate.neighbours=5" in capsys.readouterr().err
    assert folder.names(".png") == PICTURES


def test_a_single_test_image_leaves_no_figure_but_reasons(measure, capsys):
    metrics, folder = measure(FRESH, test=TEST[:1])
    assert metrics["n"] == 1
    assert not {*FLOORED, "copies", "nearest_median"} & metrics.keys()
    assert len(metrics["absent"]) == 3
    assert capsys.readouterr().err.count("evaluate: no ") == 3
    assert folder.names(".png") == []


def test_features_follow_the_ids_of_their_images(measure, tmp_path):
    _, folder = measure(FRESH)
    run = Folder(folder.uri.removesuffix("/evaluate"))
    model, table = load_encoder(run / "encoder"), run / "ingest" / "images"
    features = EmbeddingTable(run / "latents", "train").draw(20, 0)
    images = images_by_id(table, features.ids)
    assert np.array_equal(images[:, 0], [TRAIN[int(name.removeprefix("train"))] for name in features.ids])
    assert torch.allclose(features.embeddings, embed(model, images, 32), atol=0.02)
    fresh = extract(model, table, Folder(f"{tmp_path}/embedded")).draw(len(TRAIN) + len(TEST), 0, by=None)
    again = fresh.embeddings[[fresh.ids.index(name) for name in features.ids]]
    assert torch.allclose(features.embeddings, again, atol=0.02)
    with pytest.raises(ValueError, match="holds no image"):
        extract(model, run / "nothing", Folder(f"{tmp_path}/none"))


def test_a_draw_holds_every_source_in_its_share_and_in_random_order(measure):
    _, folder = measure(FRESH)
    drawn = EmbeddingTable(Folder(folder.uri.removesuffix("/evaluate")) / "latents", "train").draw(40, 0)
    numbers = [int(name.removeprefix("train")) for name in drawn.ids]
    assert len(set(numbers)) == 40
    assert sum(number < len(TRAIN) // 20 for number in numbers) == 2
    assert numbers != sorted(numbers)


def test_one_image_may_be_asked_for_twice(measure):
    _, folder = measure(FRESH)
    table = Folder(folder.uri.removesuffix("/evaluate")) / "sample" / "corpus"
    assert np.array_equal(images_by_id(table, ["made3", "made1", "made3"])[:, 0], FRESH[[3, 1, 3]])


@pytest.mark.parametrize("side", [32, 512])
def test_a_sheet_shows_every_image_at_no_more_than_128_pixels(side):
    shown = Image.open(io.BytesIO(plots.sheet(np.full((9, 1, side, side), 200, np.uint8), 4)))
    tile = min(side, 128)
    assert shown.size == (4 * tile + 9, 3 * tile + 6)
    assert np.count_nonzero(np.asarray(shown)[..., 1]) == 9 * tile**2
