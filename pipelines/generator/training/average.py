"""The EMA that is exported: of any width, reconstructed from the snapshots after the training (EDM2; `ema`)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cluster.session import Resources, device
from cluster.storage import Folder
from cluster.tasks import run_on_accelerator
from pipelines.generator.export import build_pipeline, export_generator
from pipelines.generator.latents.dataset import draw_val_images
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.generator.training import checkpoint, validate
from pipelines.generator.training.ema import STORED, average_name, combination
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.saver import SNAPSHOTS
from pipelines.generator.training.sharded_state import Tensors
from pipelines.monitor.progress import say

WIDTHS = (0.03, 0.05, 0.075, 0.1, 0.15)  # candidates: 16 snapshots give each of them to 4 %
DEFAULT_WIDTH = 0.1  # without val images


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a training run, with what a generator is built from."""

    spec: TrainingSpec
    selected: Folder  # the checkpoint
    autoencoder: Folder
    encoder: Folder

    def weights(self, width: float) -> Tensors:
        """The EMA of any width at the checkpoint, by parameter; from the snapshots before it and its own EMAs."""
        images = checkpoint.images_seen(self.selected)
        before = [folder for folder in checkpoint.list_complete(self.spec.folder / SNAPSHOTS)
                  if checkpoint.images_seen(folder) < images]
        folders = [*before, self.selected]
        coefficients, error = combination([checkpoint.images_seen(folder) for folder in folders], width)
        if error > 0.1:
            say(f"train: {len(folders)} snapshots give the EMA of width {width:g} to {error:.0%} only; raise "
                "trainer.ema_snapshots")
        total: Tensors = {}
        for folder, row in zip(folders, coefficients.tolist(), strict=True):
            for stored, coefficient in zip(STORED, row, strict=True):
                part = checkpoint.read_part(folder, average_name(stored))
                if not total:
                    total = {name: torch.zeros_like(value) for name, value in part.items()}
                torch._foreach_add_(list(total.values()), list(part.values()), alpha=coefficient)
        return total

    def measure(self, width: float, frechet: bool) -> dict[str, float]:
        """`val_loss` of an EMA and, if asked for and there are 2 val images, `val_frechet`."""
        spec, settings = self.spec, self.spec.settings
        latent_spec = read_latent_spec(spec.latents)
        val = draw_val_images(spec.latents, latent_spec, settings.validate.images, settings.seed)
        denoiser = spec.denoiser(latent_spec).to(device()).eval()
        denoiser.load_state_dict(self.weights(width))
        losses, _ = validate.held_out_losses(spec, denoiser, val)
        metrics = {"val_loss": losses.mean().item()}
        if frechet and len(val) > 1:
            pipeline = build_pipeline(denoiser, self.autoencoder, self.encoder, settings.objective,
                                      settings.validate.steps, settings.validate.guidance)
            pipeline.set_progress_bar_config(disable=True)
            metrics["val_frechet"] = validate.frechet_to(pipeline, val, len(val), settings.validate.batch)
        return {name: float(f"{value:.6g}") for name, value in metrics.items()}

    def export(self, width: float) -> int:
        """Write generator/ from the EMA of this width.  Returns the number of its parameters."""
        spec, validation = self.spec, self.spec.settings.validate
        denoiser = spec.denoiser(read_latent_spec(spec.latents)).to(device()).eval()
        checkpoint.load_checked_weights(denoiser, self.weights(width))
        pipeline = build_pipeline(denoiser, self.autoencoder, self.encoder, spec.settings.objective, validation.steps,
                                  validation.guidance)
        export_generator(pipeline, spec.folder / "generator")
        return sum(p.numel() for p in denoiser.parameters())


def choose_width(model: TrainedModel, resources: Resources) -> tuple[float, dict[float, dict[str, float]]]:
    """The width to export: the one asked for, or of WIDTHS the one with the lowest Fréchet distance on val images.

    All are sampled from the same noise with the same conditions, each in a Ray task, as many at a time as there are
    GPUs.

    Returns:
        The width, and the metrics by width, of those that were measured.
    """
    settings = model.spec.settings
    asked = settings.trainer.ema_width
    if not settings.validate.images:
        return asked or DEFAULT_WIDTH, {}
    widths = WIDTHS if asked is None else (asked,)
    with ThreadPoolExecutor(max(resources.gpus, 1)) as pool:
        metrics = list(pool.map(
            lambda width: run_on_accelerator(resources, model.measure, width, asked is None), widths))
    measured = dict(zip(widths, metrics, strict=True))
    if asked is not None:
        return asked, measured
    distances = {width: found["val_frechet"] for width, found in measured.items()
                 if math.isfinite(found.get("val_frechet", math.nan))}
    best = min(distances, key=distances.__getitem__, default=DEFAULT_WIDTH)
    say("train: Fréchet distance by width of the EMA: "
        + ", ".join(f"{width:g}: {distance:.4g}" for width, distance in distances.items()))
    return best, measured
