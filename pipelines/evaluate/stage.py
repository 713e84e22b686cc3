"""Stage `evaluate`: the synthetic corpus against the real test split, each figure beside its real-to-real floor.

The floor puts as many real training images in the place of the synthetic ones, against the same test images: what
remains between two samples of real data at this size and with these features. Real samples are stratified by source.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.evaluate.features import Embedded, Features, extract
from pipelines.evaluate.settings import EvaluateSettings
from pipelines.generator.encoder.vit import load_encoder
from pipelines.graph.stage import Metrics, Stage
from pipelines.metrics.diversity import ms_ssim
from pipelines.metrics.fidelity import frechet_distance, prdc
from pipelines.metrics.memorisation import memorisation, nearest_neighbours
from pipelines.monitor.progress import say
from pipelines.report import plots as figures
from pipelines.tables.images import images_of

REFERENCE = "test"
SHOWN = 12
HELD_OUT = 4  # images that the floor of the nearest-neighbour check needs
QUERIES = 131_072  # synthetic images compared in one pass over the training images
MAX_HELD_OUT = 10_000  # images of that floor: beyond these its 1st percentile is known well enough


def evaluate(stage: Stage) -> Metrics:
    """Returns fidelity, diversity and nearest-neighbour figures, each with its floor, and what they were measured with.

    A figure that the sets are too small for is absent, and `absent` says why.
    """
    known = stage.record_of("encoder")["metrics"]
    work = (stage.folder, stage.input("ingest") / "images", stage.input("latents"), stage.input("sample") / "corpus",
            stage.input("encoder"), stage.section(EvaluateSettings), stage.seed)
    metrics = compute(stage.resources, compare, *work)
    for figure, why in metrics.get("absent", {}).items():
        say(f"evaluate: no {figure}: {why}")
    return {"extractor": f"this run's encoder ({known['weights']}; {known['dim']}-d)", "dim": known["dim"],
            "reference": REFERENCE, **metrics}


def compare(
    folder: Folder, images: Folder, latents: Folder, corpus: Folder, encoder: Folder, settings: EvaluateSettings,
    seed: int,
) -> Metrics:
    train, test = Embedded(latents, "train"), Embedded(latents, REFERENCE)
    synthetic = extract(load_encoder(encoder).to(device()), corpus, folder / "embeddings")
    n = min(settings.images, len(train), len(test), len(synthetic))
    reference, floor, chosen = test.draw(n, seed), train.draw(n, seed), synthetic.draw(n, seed, by=None)
    short = shortages(n, len(test), settings)
    metrics: Metrics = {"n": n}
    for suffix, part, table in (("", chosen, corpus), ("_floor", floor, images)):
        found = fidelity(reference.embeddings, part.embeddings, settings.neighbours)
        if n >= 2:
            shown = images_of(table, part.ids[: 2 * settings.pairs])  # as many as all pairs can be of
            found["ms_ssim"] = ms_ssim(torch.from_numpy(shown).to(device()), settings.pairs, seed)
        metrics |= {name + suffix: round(value, 4) for name, value in found.items()}
    if n >= 2:
        folder.write("embedding.png", figures.scatter(host(reference.embeddings), host(chosen.embeddings)))
    if len(test) >= HELD_OUT:
        metrics |= nearest(folder, images, corpus, train, test.draw(MAX_HELD_OUT, seed), synthetic)
    return metrics | ({"absent": short} if short else {})


def shortages(n: int, held_out: int, settings: EvaluateSettings) -> dict[str, str]:
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


def nearest(folder: Folder, images: Folder, corpus: Folder, train: Embedded, held_out: Features,
            synthetic: Embedded) -> Metrics:
    """Compare all synthetic images with all training images, block by block; draws the closest pairs as nearest.png."""
    floor, _ = nearest_neighbours(train.blocks(), held_out.embeddings)
    found = [nearest_neighbours(train.blocks(), block) for block in synthetic.blocks(QUERIES)]
    distances, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    closest = distances.argsort()[:SHOWN].cpu()
    copies = (images_of(corpus, [synthetic.ids[row] for row in closest.tolist()]),
              images_of(images, [train.ids[row] for row in rows.cpu()[closest].tolist()]))
    folder.write("nearest.png", figures.nearest(*copies, host(distances)[closest.numpy()]))
    return {name: round(value, 4) for name, value in memorisation(distances, floor).items()} | {
        "nearest_checked": len(synthetic)}


def host(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
