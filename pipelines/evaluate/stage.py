"""Stage `evaluate`: compares the synthetic corpus with the real test split, with a real-to-real floor for each metric.

The floor is the value of a metric when the synthetic images are replaced by as many real training images: the remaining
difference between two samples of real data at this size and with these features. Real samples are stratified by source.
Fidelity is the mean over several disjoint samples of equal size: the Fréchet distance of a few hundred images varies by
a factor of two between samples of the same images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import run_on_accelerator
from pipelines.evaluate import plots
from pipelines.evaluate.features import EmbeddingTable, Features, extract
from pipelines.evaluate.settings import EvaluateSettings
from pipelines.generator.encoder.vit import load_encoder
from pipelines.graph.stage import Metrics, Stage
from pipelines.metrics.diversity import ms_ssim
from pipelines.metrics.fidelity import frechet_distance, prdc
from pipelines.metrics.memorisation import memorisation, nearest_neighbours
from pipelines.metrics.spectrum import power_spectrum, spectrum_error
from pipelines.monitor.progress import say
from pipelines.tables.images import images_by_id

REFERENCE = "test"
DRAWS = 5  # samples of each table that are compared with the reference, at most
PAIRS_SHOWN = 12
MIN_HELD_OUT = 4  # test images needed for the floor of the nearest-neighbour check
QUERIES = 131_072  # synthetic images compared in one pass over the training images
MAX_HELD_OUT = 10_000  # test images compared for that floor: enough to estimate its 1st percentile


def evaluate(stage: Stage) -> Metrics:
    """Returns fidelity, diversity and nearest-neighbour metrics, each with its floor, and the extractor and sizes.

    Metrics for which the sets are too small are missing; `absent` gives the reasons.
    """
    encoder = stage.record_of("encoder")["metrics"]
    arguments = (stage.folder, stage.input("ingest") / "images", stage.input("latents"),
                 stage.input("sample") / "corpus", stage.input("encoder"), stage.section(EvaluateSettings), stage.seed)
    metrics = run_on_accelerator(stage.resources, compare, *arguments)
    for metric, reason in metrics.get("absent", {}).items():
        say(f"evaluate: no {metric}: {reason}")
    return {"extractor": f"this run's encoder ({encoder['weights']}; {encoder['dim']}-d)", "dim": encoder["dim"],
            "reference": REFERENCE, **metrics}


def compare(
    folder: Folder, images: Folder, latents: Folder, corpus: Folder, encoder: Folder, settings: EvaluateSettings,
    seed: int,
) -> Metrics:
    train, test = EmbeddingTable(latents, "train"), EmbeddingTable(latents, REFERENCE)
    synthetic = extract(load_encoder(encoder).to(device()), corpus, folder / "embeddings")
    n = min(settings.images, len(train), len(test), len(synthetic))
    reference, floor, sample = (test.draw(n, seed), train.draw(DRAWS * n, seed),
                                synthetic.draw(DRAWS * n, seed, by=None))
    short = shortages(n, len(test), settings)
    shown = min(n, 2 * settings.pairs)  # images decoded of each set: the most that the pairs can have
    real, held_out = decoded(images, [*floor.ids[:shown], *reference.ids[:shown]]).split(shown)
    spectrum = power_spectrum(held_out)
    metrics: Metrics = {"n": n}
    for suffix, features, pixels in (("", sample, decoded(corpus, sample.ids[:shown])), ("_floor", floor, real)):
        values = fidelity(reference.embeddings, features.embeddings, settings.neighbours)
        values |= spectrum_error(spectrum, power_spectrum(pixels))
        if n >= 2:
            values["ms_ssim"] = ms_ssim(pixels, settings.pairs, seed)
        metrics |= {name + suffix: round(value, 4) for name, value in values.items()}
    if n >= 2:
        folder.write("embedding.png", plots.scatter(host(reference.embeddings), host(sample.embeddings[:n])))
    if len(test) >= MIN_HELD_OUT:
        metrics |= nearest(folder, images, corpus, train, test.draw(MAX_HELD_OUT, seed), synthetic)
    return metrics | ({"absent": short} if short else {})


def shortages(n: int, held_out: int, settings: EvaluateSettings) -> dict[str, str]:
    """The metrics for which `n` images per set and `held_out` test images are too few, and the reasons."""
    short = {}
    if n < 2:
        short["Fréchet distance and MS-SSIM"] = f"they need 2 images per set, there is {n}"
    if n <= settings.neighbours:
        short["precision, recall, density and coverage"] = (
            f"evaluate.neighbours={settings.neighbours} needs more images per set than that, there are {n}")
    if held_out < MIN_HELD_OUT:
        short["nearest-neighbour check"] = f"it needs {MIN_HELD_OUT} test images, there are {held_out}"
    return short


def fidelity(reference: Tensor, other: Tensor, neighbours: int) -> dict[str, float]:
    """Fréchet distance, precision, recall, density and coverage, if n is large enough.

    Args:
        reference: (n, D).
        other: (N, D), N >= n: the mean over its first samples of n rows, of which there are N // n.
    """
    n = len(reference)
    values: list[dict[str, float]] = []
    for start in range(0, len(other) - n + 1, n):
        sample = other[start : start + n]
        frechet = {"frechet": frechet_distance(reference, sample)} if n >= 2 else {}
        values.append(frechet | (prdc(reference, sample, neighbours) if n > neighbours else {}))
    return {name: float(np.mean([value[name] for value in values])) for name in values[0]}


def nearest(folder: Folder, images: Folder, corpus: Folder, train: EmbeddingTable, held_out: Features,
            synthetic: EmbeddingTable) -> Metrics:
    """Compare all synthetic with all training images, block by block; plots the closest pairs in nearest.png."""
    floor, _ = nearest_neighbours(train.blocks(), held_out.embeddings)
    neighbours = [nearest_neighbours(train.blocks(), block) for block in synthetic.blocks(QUERIES)]
    distances, rows = (torch.cat(blocks) for blocks in zip(*neighbours, strict=True))
    closest = distances.argsort()[:PAIRS_SHOWN].cpu()
    pairs = (images_by_id(corpus, [synthetic.ids[row] for row in closest.tolist()]),
             images_by_id(images, [train.ids[row] for row in rows.cpu()[closest].tolist()]))
    folder.write("nearest.png", plots.nearest(*pairs, host(distances)[closest.numpy()]))
    return {name: round(value, 4) for name, value in memorisation(distances, floor).items()} | {
        "nearest_checked": len(synthetic)}


def decoded(table: Folder, ids: Sequence[str]) -> Tensor:
    """Images of a table, uint8 (N, 1, H, W) on this process's device."""
    return torch.from_numpy(images_by_id(table, ids)).to(device())


def host(values: Tensor) -> np.ndarray:
    """A tensor as an array in CPU memory."""
    return values.cpu().numpy()
