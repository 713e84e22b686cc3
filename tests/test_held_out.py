"""What learns is the same whatever the held-out images are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from safetensors.numpy import load_file

from pipelines.data.phantom import render
from pipelines.graph.compose import load_settings
from pipelines.graph.run import run_stages


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_no_pixel_of_val_or_test_reaches_what_learns(tmp_path):
    """Two folders that differ in nothing but the held-out images come to the same networks, to the last bit."""
    random = np.random.default_rng(0)
    for name in ("first", "second"):
        for split, count in (("train", 64), ("val", 8), ("test", 8)):
            folder = tmp_path / name / split
            folder.mkdir(parents=True)
            for k in range(count):
                seed = (0, k) if split == "train" else (*random.integers(1, 1000, 2),)
                Image.fromarray(render(int(seed[0]), int(seed[1]), 32).image).save(folder / f"{k}.png")
        settings = load_settings(*TINY, "data=folder", f"data.root={tmp_path / name}", "name=run",
                                 f"storage={tmp_path / name}-runs")
        run_stages(settings, ["ingest", "autoencoder", "encoder", "latents", "train"], redo=False)
    for network in ("autoencoder/model", "encoder/model", "train/generator/unet"):
        first, second = (load_file(next((tmp_path / f"{name}-runs/run" / network).glob("*.safetensors")))
                         for name in ("first", "second"))
        assert first.keys() == second.keys()
        assert all((first[key] == second[key]).all() for key in first), network
    psnr = [json.loads((tmp_path / f"{name}-runs/run/autoencoder/stage.json").read_text())["metrics"]["psnr"]
            for name in ("first", "second")]
    assert psnr[0] != psnr[1], "the held-out images were the same"
