"""What a checkpoint is worth, measured beside the training on patients it does not learn from.

The loss is taken at fixed noise and evenly spread noise levels, so that two checkpoints differ in nothing but their
weights; it is far steadier than the loss of training.
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
from pipelines.generator.denoiser.objective import Draw, Objective
from pipelines.generator.export import in_memory
from pipelines.generator.latents.dataset import Encoded, held_out
from pipelines.generator.latents.spec import latent_spec
from pipelines.generator.settings import CONDITIONS, TrainerSettings
from pipelines.generator.standalone.pipeline import RayographPipeline
from pipelines.generator.training import checkpoint
from pipelines.generator.training.ema import average_name
from pipelines.generator.training.loop import Job
from pipelines.generator.training.metrics import BINS
from pipelines.graph.settings import Settings
from pipelines.learning.precision import autocast
from pipelines.monitor.journal import read_journal

FILE = "validation.jsonl"
NOISE_SEED = 2**31 - 1  # of the fixed noise; no step of a training has it


def validate(job: Job, autoencoder: Folder, encoder: Folder, folder: Folder, frechet: bool) -> dict[str, float]:
    """Measure the checkpoint in `folder`, add a line to validation.jsonl and a picture to samples/.

    Returns:
        `val_loss` of the first average of the weights, by noise level too, and of the others; `val_frechet` if asked.
    """
    settings = job.settings
    spec = latent_spec(job.latents)
    most = max(settings.validate.images, settings.validate.sample_images,
               settings.validate.frechet_images if frechet else 0)
    val = held_out(job.latents, spec, most, settings.seed)
    denoiser = job.denoiser(spec).to(device()).eval()
    images = checkpoint.cursor_of(folder).images
    found: dict[str, float] = {}
    names = loss_names(settings.trainer)
    for average, name in reversed(names.items()):  # the first is then the one that samples
        denoiser.load_state_dict(checkpoint.read_part(folder, average))
        losses, levels = held_out_losses(job, denoiser, val)
        found[name] = losses.mean().item()
    bins = (levels * BINS).long()
    found |= {f"val_loss_noise_{b + 1}": losses[bins == b].mean().item() for b in range(BINS) if (bins == b).any()}
    generator = in_memory(settings, denoiser, autoencoder, encoder)
    generator.set_progress_bar_config(disable=True)
    if settings.validate.sample_images:
        show(job, generator, val, images)
    if frechet:
        found["val_frechet"] = frechet_to(generator, val, settings)
    told = {"images": images} | {name: float(f"{value:.6g}") for name, value in found.items()}
    append(job.folder, told)
    return told


def loss_names(trainer: TrainerSettings) -> dict[str, str]:
    """What the validation loss of each average of the weights is called: `val_loss` of the first."""
    first, *others = map(average_name, trainer.ema_halflife_images)
    return {first: "val_loss", **{name: f"val_loss_{name}" for name in others}}


@torch.no_grad()
def held_out_losses(job: Job, denoiser: Denoiser, val: Encoded) -> tuple[Tensor, Tensor]:
    """Losses (N,) and noise levels (N,) of the drawn images, conditioned on all that is known of them."""
    settings, where = job.settings, device()
    n = min(settings.validate.images, len(val))
    random = torch.Generator().manual_seed(NOISE_SEED)
    levels = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=random)].to(where)
    objective, normalise, losses = Objective(settings.objective, settings.condition, where), job.normaliser(where), []
    for start in range(0, n, settings.validate.batch):
        rows = np.arange(start, min(start + settings.validate.batch, n))
        mean, _, given = val.rows(rows, where)
        noise = torch.randn(mean.shape, generator=random).to(where)
        keep = torch.zeros(len(rows), dtype=torch.bool, device=where)
        draw = Draw(noise, noise, levels[rows], dict.fromkeys(CONDITIONS, keep))
        with autocast():
            losses.append(objective.losses(denoiser, normalise(mean), given, draw))
    return torch.cat(losses), levels


def sample(generator: RayographPipeline, val: Encoded, rows: np.ndarray) -> Tensor:
    """Images (B, 1, H, W) in [0, 1] with the conditions of these images; fixed seeds, one an image."""
    _, _, given = val.rows(rows, device())
    known: dict[str, Any] = {name: value for name, value in given.items() if name in generator.conditioner.shapes}
    seeds = [torch.Generator().manual_seed(int(row)) for row in rows]
    latents = torch.stack([torch.randn(generator.latent, generator=seed) for seed in seeds])
    with autocast():
        [images] = generator(**known, latents=latents, output_type="pt", return_dict=False)
    return images.float()


def show(job: Job, generator: RayographPipeline, val: Encoded, images: int) -> None:
    """samples/images-N.png: held-out images as their latents show them, each above a sample conditioned on it."""
    from torchvision.utils import save_image

    shown = min(job.settings.validate.sample_images, len(val))
    rows = np.linspace(0, len(val) - 1, shown).astype(np.int64)  # sources lie one after another
    mean, _, _ = val.rows(rows, device())
    with torch.no_grad():
        real = generator._decode(job.normaliser(device())(mean))
    with tempfile.TemporaryDirectory() as staging:
        file = Path(staging) / f"{checkpoint.name(images)}.png"
        save_image(torch.cat([real, sample(generator, val, rows)]), str(file), nrow=len(rows))
        (job.folder / "samples").write(file.name, file.read_bytes())


def frechet_to(generator: RayographPipeline, val: Encoded, settings: Settings) -> float:
    """Fréchet distance, in the run's own encoder, of samples to the images of the split whose conditions they have."""
    from pipelines.metrics.fidelity import frechet_distance

    n = min(settings.validate.frechet_images, len(val))
    batch = settings.validate.batch
    chunks = [np.arange(start, min(start + batch, n)) for start in range(0, n, batch)]
    found = torch.cat([generator.encoder.embed(sample(generator, val, rows)) for rows in chunks])
    real = torch.from_numpy(val.given["embedding"][:n]).to(found)
    return frechet_distance(real, found)


def append(folder: Folder, found: dict[str, float]) -> None:
    """Add a line to validation.jsonl, in the place of what an earlier attempt said of the same checkpoint."""
    kept = [entry for entry in read_journal(folder, FILE) if entry["images"] < found["images"]]
    folder.write(FILE, "".join(json.dumps(entry) + "\n" for entry in [*kept, found]).encode())


def of(folder: Folder, images: int) -> dict[str, Any]:
    """What was measured of the checkpoint at `images`; empty where it was not."""
    return next((entry for entry in read_journal(folder, FILE) if entry["images"] == images), {})
