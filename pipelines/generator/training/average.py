"""The EMA that is exported: of any length, reconstructed from the snapshots after the training (EDM2; `ema`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from cluster.session import Resources, device
from cluster.storage import Folder
from cluster.tasks import run_each_on_accelerator
from pipelines.generator.export import build_pipeline, export_generator
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.generator.training import checkpoint, validate
from pipelines.generator.training.ema import STORED, average_name, combination
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.saver import SNAPSHOTS
from pipelines.generator.training.sharded_state import Tensors
from pipelines.monitor.progress import say

LENGTHS = (0.05, 0.075, 0.1, 0.15, 0.2)  # candidates: 16 snapshots give each of them to 3 %
DEFAULT_LENGTH = 0.1
MIN_IMAGES = 4  # val images needed to choose among the candidates, as a multiple of the features' dimensions
MAX_ERROR = 0.1  # of a candidate's profile
NEGLIGIBLE = 1e-6  # coefficient of a snapshot that is not read


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a training run, with what a generator is built from."""

    spec: TrainingSpec
    selected: Folder  # the checkpoint
    autoencoder: Folder
    encoder: Folder

    @functools.cached_property
    def snapshots(self) -> list[Folder]:
        """The snapshots before the checkpoint, and the checkpoint."""
        images = checkpoint.images_seen(self.selected)
        complete = checkpoint.list_complete(self.spec.folder / SNAPSHOTS)
        return [*(folder for folder in complete if checkpoint.images_seen(folder) < images), self.selected]

    @functools.cached_property
    def can_compare(self) -> bool:
        """Whether there are enough val images for Fréchet distances that tell candidates apart."""
        latent_spec = read_latent_spec(self.spec.latents)
        images = min(self.spec.settings.validate.images, latent_spec.images["val"])
        return images >= MIN_IMAGES * latent_spec.shapes["embedding"][0]

    def profile_error(self, length: float) -> float:
        """How far the reconstructed EMA is from one of this length: relative L2 error of its profile."""
        return combination([checkpoint.images_seen(folder) for folder in self.snapshots], length)[1]

    def weights(self, length: float) -> Tensors:
        """The EMA of any length at the checkpoint, by parameter."""
        folders = self.snapshots
        coefficients, _ = combination([checkpoint.images_seen(folder) for folder in folders], length)
        total: Tensors = {}
        for folder, row in zip(folders, coefficients.tolist(), strict=True):
            for stored, coefficient in zip(STORED, row, strict=True):
                if abs(coefficient) < NEGLIGIBLE:
                    continue
                part = checkpoint.read_part(folder, average_name(stored))
                if total:
                    torch._foreach_add_(list(total.values()), list(part.values()), alpha=coefficient)
                else:
                    total = part
                    torch._foreach_mul_(list(total.values()), coefficient)
                del part
        return total

    def measure(self, length: float) -> dict[str, float]:
        """`val_loss` of an EMA and, if there are enough val images, `val_frechet`."""
        spec, settings = self.spec, self.spec.settings
        latent_spec = read_latent_spec(spec.latents)
        val = validate.drawn(spec, latent_spec, settings.validate.images)
        denoiser = spec.denoiser(latent_spec).to(device()).eval()
        denoiser.load_state_dict(self.weights(length))
        losses, _ = validate.held_out_losses(spec, denoiser, val)
        metrics = {"val_loss": losses.mean().item()}
        if self.can_compare:
            pipeline = build_pipeline(denoiser, self.autoencoder, self.encoder, settings.objective,
                                      settings.validate.steps, settings.validate.guidance)
            pipeline.set_progress_bar_config(disable=True)
            metrics["val_frechet"] = validate.frechet_to(pipeline, val, settings.validate.batch)
        return {name: float(f"{value:.6g}") for name, value in metrics.items()}

    def export(self, length: float) -> int:
        """Write generator/ from the EMA of this length.  Returns the number of its parameters."""
        spec, validation = self.spec, self.spec.settings.validate
        denoiser = spec.denoiser(read_latent_spec(spec.latents)).to(device()).eval()
        checkpoint.load_checked_weights(denoiser, self.weights(length))
        pipeline = build_pipeline(denoiser, self.autoencoder, self.encoder, spec.settings.objective, validation.steps,
                                  validation.guidance)
        export_generator(pipeline, spec.folder / "generator")
        return sum(p.numel() for p in denoiser.parameters())


def candidate_lengths(model: TrainedModel) -> list[float]:
    """The lengths to choose from; one alone if it is asked for, or if there are too few val images to compare."""
    settings = model.spec.settings
    if asked := settings.trainer.ema_length:
        if (error := model.profile_error(asked)) > MAX_ERROR:
            say(f"train: the exported EMA is of length {asked:g} to {error:.0%} only; for a closer one train with more "
                "trainer.ema_snapshots, or a length from 0.04 to 0.2")
        return [asked]
    if model.can_compare:
        return [length for length in LENGTHS if model.profile_error(length) < MAX_ERROR]
    say(f"train: exports the EMA of length {DEFAULT_LENGTH:g}; to compare lengths by the Fréchet distance, val images "
        f"(and validate.images) must number {MIN_IMAGES} times the dimensions of the encoder's features")
    return [DEFAULT_LENGTH]


def choose_length(model: TrainedModel, resources: Resources) -> tuple[float, dict[float, dict[str, float]]]:
    """The length to export: of the candidates the one with the lowest Fréchet distance on val images.

    All are sampled from the same noise with the same conditions.

    Returns:
        The length, and the metrics by length, of those that could be measured.
    """
    candidates, measured, validation = candidate_lengths(model), {}, model.spec.settings.validate
    if validation.images:
        say(f"train: measures {len(candidates)} EMAs on up to {validation.images:,} val images")
        for length, result in run_each_on_accelerator(resources, model.measure, candidates, validation.max_seconds):
            if isinstance(result, Exception):
                say(f"train: the EMA of length {length:g} could not be measured: {result}")
            else:
                measured[length] = result
                say(f"train: EMA of length {length:g}: "
                    + ", ".join(f"{name} {value:.4g}" for name, value in result.items()))
    if len(candidates) == 1:
        return candidates[0], measured
    distances = {length: metrics["val_frechet"] for length, metrics in measured.items()}
    return min(distances, key=distances.__getitem__, default=DEFAULT_LENGTH), measured
