"""Validation of checkpoints on held-out patients, in a task alongside training.

The loss is taken at fixed noise and evenly spaced noise levels, so that two checkpoints differ in nothing but their
weights; it varies far less than the training loss.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.denoiser.network import Denoiser
from pipelines.generator.denoiser.objective import Objective, StepRandomness
from pipelines.generator.export import build_pipeline
from pipelines.generator.latents.dataset import LatentArrays, draw_val_images
from pipelines.generator.latents.spec import LatentSpec, read_latent_spec
from pipelines.generator.settings import CONDITIONS
from pipelines.generator.standalone.pipeline import RayographPipeline
from pipelines.generator.training import checkpoint
from pipelines.generator.training.ema import STORED, average_name
from pipelines.generator.training.interval_log import BINS
from pipelines.generator.training.loop import TrainingSpec
from pipelines.learning.precision import autocast
from pipelines.monitor.journal import read_journal

FILE = "validation.jsonl"
NOISE_SEED = 2**31 - 1  # of the fixed noise; no training step uses it


def validate(spec: TrainingSpec, autoencoder: Folder, encoder: Folder, folder: Folder,
             frechet: bool) -> dict[str, float]:
    """Validate the checkpoint in `folder`; adds a line to validation.jsonl and a sample grid to samples/.

    Returns:
        `val_loss` of the first EMA of the weights, also by noise level; `val_frechet` if `frechet`.
    """
    settings, validation = spec.settings, spec.settings.validate
    latent_spec = read_latent_spec(spec.latents)
    denoiser = spec.denoiser(latent_spec).to(device()).eval()
    images = checkpoint.read_cursor(folder).images
    denoiser.load_state_dict(checkpoint.read_part(folder, average_name(STORED[0])))
    losses, levels = held_out_losses(spec, denoiser, drawn(spec, latent_spec, validation.images))
    metrics = {"val_loss": losses.mean().item()}
    bins = (levels * BINS).long()
    metrics |= {f"val_loss_noise_{b + 1}": losses[bins == b].mean().item() for b in range(BINS) if (bins == b).any()}
    pipeline = build_pipeline(denoiser, autoencoder, encoder, settings.objective, validation.steps,
                              validation.guidance)
    pipeline.set_progress_bar_config(disable=True)
    if validation.sample_images:
        save_sample_grid(spec, pipeline, drawn(spec, latent_spec, validation.sample_images), images)
    if frechet:
        val = drawn(spec, latent_spec, validation.frechet_images)
        metrics["val_frechet"] = frechet_to(pipeline, val, validation.batch)
    entry = {"images": images} | {name: float(f"{value:.6g}") for name, value in metrics.items()}
    append_validation(spec.folder, entry)
    return entry


def drawn(spec: TrainingSpec, latent_spec: LatentSpec, images: int) -> LatentArrays:
    """A random sample of so many val images (or all), stratified by source, the same for every checkpoint."""
    return draw_val_images(spec.latents, latent_spec, images, spec.settings.seed)


@torch.no_grad()
def held_out_losses(spec: TrainingSpec, denoiser: Denoiser, val: LatentArrays) -> tuple[Tensor, Tensor]:
    """Losses (N,) and noise levels (N,) of these val images, with all their conditions."""
    settings, where, n = spec.settings, device(), len(val)
    random = torch.Generator().manual_seed(NOISE_SEED)
    levels = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=random)].to(where)
    objective, normalise, losses = Objective(settings.objective, settings.condition, where), spec.normaliser(where), []
    for start in range(0, n, settings.validate.batch):
        rows = np.arange(start, min(start + settings.validate.batch, n))
        mean, _, conditions = val.rows(rows, where)
        noise = torch.randn(mean.shape, generator=random).to(where)
        none = torch.zeros(len(rows), dtype=torch.bool, device=where)
        randomness = StepRandomness(noise, noise, levels[rows], dict.fromkeys(CONDITIONS, none))
        with autocast():
            losses.append(objective.losses(denoiser, normalise(mean), conditions, randomness))
    return torch.cat(losses), levels


def sample_conditioned_on(pipeline: RayographPipeline, val: LatentArrays, rows: np.ndarray) -> Tensor:
    """Images (B, 1, H, W) in [0, 1], sampled with the conditions of these val images and one fixed seed each."""
    _, _, conditions = val.rows(rows, device())
    used: dict[str, Any] = {name: value for name, value in conditions.items() if name in pipeline.conditioner.shapes}
    seeds = [torch.Generator().manual_seed(int(row)) for row in rows]
    latents = torch.stack([torch.randn(pipeline.latent, generator=seed) for seed in seeds])
    with autocast():
        [images] = pipeline(**used, latents=latents, output_type="pt", return_dict=False)
    return images.float()


def save_sample_grid(spec: TrainingSpec, pipeline: RayographPipeline, val: LatentArrays, images: int) -> None:
    """samples/images-N.png: val images, decoded from their latents, each above a sample conditioned on it."""
    from torchvision.utils import save_image

    rows = np.arange(len(val))
    mean, _, _ = val.rows(rows, device())
    with torch.no_grad():
        real = pipeline.decode(spec.normaliser(device())(mean))
    with tempfile.TemporaryDirectory() as staging_dir:
        file = Path(staging_dir) / f"{checkpoint.directory_name(images)}.png"
        save_image(torch.cat([real, sample_conditioned_on(pipeline, val, rows)]), str(file), nrow=len(rows))
        (spec.folder / "samples").write(file.name, file.read_bytes())


def frechet_to(pipeline: RayographPipeline, val: LatentArrays, batch: int) -> float:
    """Fréchet distance, in features of the run's encoder, between val images and samples with their conditions.

    Args:
        batch: images per forward pass.
    """
    from pipelines.metrics.fidelity import frechet_distance

    chunks = [np.arange(start, min(start + batch, len(val))) for start in range(0, len(val), batch)]
    synthetic = torch.cat([pipeline.encoder.embed(sample_conditioned_on(pipeline, val, rows)) for rows in chunks])
    real = torch.from_numpy(val.conditions["embedding"]).to(synthetic)
    return frechet_distance(real, synthetic)


def append_validation(folder: Folder, entry: dict[str, float]) -> None:
    """Add a line to validation.jsonl, replacing those of an earlier attempt for this and later checkpoints."""
    kept = [earlier for earlier in read_journal(folder, FILE) if earlier["images"] < entry["images"]]
    folder.write(FILE, "".join(json.dumps(line) + "\n" for line in [*kept, entry]).encode())


def validation_at(folder: Folder, images: int) -> dict[str, Any]:
    """The validation metrics of the checkpoint at `images`; empty if it was not validated."""
    return next((entry for entry in read_journal(folder, FILE) if entry["images"] == images), {})
