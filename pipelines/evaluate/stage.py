"""Stage `evaluate`: the synthetic corpus against the real test split, each figure beside its real-to-real floor.

The floor puts as many real training images in the place of the synthetic ones, against the same test images: what
remains between two samples of real data at this size and with these features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.evaluate.features import Features, cached, extract
from pipelines.evaluate.settings import Evaluate
from pipelines.generator.encoder.vit import load_encoder
from pipelines.graph.stage import Metrics, Stage
from pipelines.metrics.diversity import ms_ssim
from pipelines.metrics.fidelity import frechet_distance, prdc
from pipelines.metrics.memorisation import memorisation
from pipelines.monitor.progress import say
from pipelines.report import plots as figures

REFERENCE = "test"
SHOWN = 12
HELD_OUT = 4  # images that the floor of the nearest-neighbour check needs


def evaluate(stage: Stage) -> Metrics:
    """Returns fidelity, diversity and nearest-neighbour figures, each with its floor, and what they were measured with.

    A figure that the sets are too small for is absent, and `absent` says why.
    """
    known = stage.record_of("encoder")["metrics"]
    work = (stage.folder, stage.input("ingest") / "images", stage.input("latents"), stage.input("sample") / "corpus",
            stage.input("encoder"), stage.section(Evaluate), stage.seed)
    metrics = compute(stage.resources, compare, *work)
    for figure, why in metrics.get("absent", {}).items():
        say(f"evaluate: no {figure}: {why}")
    return {"extractor": f"this run's encoder ({known['weights']}; {known['dim']}-d)", "dim": known["dim"],
            "reference": REFERENCE, **metrics}


def compare(
    folder: Folder, images: Folder, latents: Folder, corpus: Folder, encoder: Folder, settings: Evaluate, seed: int
) -> Metrics:
    train, test = cached(latents, "train"), cached(latents, REFERENCE)
    synthetic = extract(load_encoder(encoder).to(device()), corpus)
    n = min(settings.images, len(train), len(test), len(synthetic))
    random = np.random.default_rng(seed)
    reference, floor, chosen = (part.draw(n, random) for part in (test, train, synthetic))
    short = shortages(n, len(test), settings)
    metrics: Metrics = {"n": n}
    for suffix, part, table in (("", chosen, corpus), ("_floor", floor, images)):
        found = fidelity(reference.embeddings, part.embeddings, settings.neighbours)
        if n >= 2:
            pictures = torch.from_numpy(figures.images_of(table, part.ids)).to(device())
            found["ms_ssim"] = ms_ssim(pictures, settings.pairs, seed)
        metrics |= {name + suffix: round(value, 4) for name, value in found.items()}
    if n >= 2:
        folder.write("embedding.png", figures.scatter(host(reference.embeddings), host(chosen.embeddings)))
    if len(test) >= HELD_OUT:
        metrics |= nearest(folder, images, corpus, train, test.draw(len(test), random), synthetic)
    return metrics | ({"absent": short} if short else {})


def shortages(n: int, held_out: int, settings: Evaluate) -> dict[str, str]:
    """The figures that `n` images a side and `held_out` test images are too few for, and why."""
    short = {}
    if n < 2:
        short["Fréchet distance and MS-SSIM"] = f"they need 2 images a side, there is {n}"
    if n <= settings.neighbours:
        short["precision, recall, density and coverage"] = (
            f"evaluate.neighbours={settings.neighbours} needs more images a side than that, there are {n}")
    if held_out < HELD_OUT:
        short["nearest-neighbour check"] = f"it needs {HELD_OUT} test images, there are {held_out}"
    return short


def fidelity(reference: Tensor, other: Tensor, neighbours: int) -> dict[str, float]:
    """Fréchet distance, precision, recall, density and coverage of two (n, D) sets, where n is large enough."""
    found = {"frechet": frechet_distance(reference, other)} if len(other) >= 2 else {}
    return found | (prdc(reference, other, neighbours) if len(other) > neighbours else {})


def nearest(folder: Folder, images: Folder, corpus: Folder, train: Features, test: Features,
            synthetic: Features) -> dict[str, Any]:
    """Compare all synthetic images with all training images; draws the closest pairs as nearest.png."""
    found = memorisation(train.embeddings, synthetic.embeddings, test.embeddings)
    distances, rows = found["nearest_distance"], found["nearest_index"]
    assert isinstance(distances, Tensor)
    assert isinstance(rows, Tensor)
    closest = distances.argsort()[:SHOWN].cpu()
    copies = images_of_rows(corpus, synthetic, closest), images_of_rows(images, train, rows.cpu()[closest])
    folder.write("nearest.png", figures.nearest(*copies, host(distances)[closest.numpy()]))
    return {name: round(value, 4) for name, value in found.items() if isinstance(value, float)} | {
        "nearest_checked": len(synthetic)}


def images_of_rows(table: Folder, features: Features, rows: Tensor) -> np.ndarray:
    return figures.images_of(table, features.take(rows.numpy()).ids)


def host(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
