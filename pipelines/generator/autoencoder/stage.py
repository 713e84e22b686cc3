"""Stage `autoencoder`: an AutoencoderKL of diffusers, from the Hub or trained on the train split; or none
(`autoencoder.space=pixel`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from monai.metrics import compute_ms_ssim
from torchmetrics.image import PeakSignalNoiseRatio

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import run_on_accelerator
from pipelines.data.split import check_filled
from pipelines.generator.autoencoder.losses import Reconstruction
from pipelines.generator.autoencoder.model import (
    create_autoencoder,
    decode_latents,
    reconstruct,
    set_statistics,
    to_model_range,
)
from pipelines.generator.settings import AutoencoderSettings
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.precision import autocast
from pipelines.learning.readers import ImageReader
from pipelines.learning.small_loop import CHECKPOINT, train_small_network
from pipelines.learning.weights import save_model
from pipelines.metrics.diversity import KERNEL, scale_weights
from pipelines.metrics.spectrum import power_spectrum, spectrum_error
from pipelines.monitor.progress import follow
from pipelines.tables.draw import draw_rows
from pipelines.tables.images import decode_images

SAMPLED_IMAGES = 2_000  # enough for the mean and standard deviation of a channel, and for PSNR, MS-SSIM and KL
GRID_IMAGES = 8


def autoencoder(stage: Stage) -> Metrics:
    """Returns what `measure` measures over a sample of the test split, and the size."""
    settings = stage.section(AutoencoderSettings)
    ingested = stage.metrics_of("ingest")
    splits = ingested["splits"]
    check_filled(splits)
    arguments = (stage.folder, stage.input("ingest") / "images", settings, ingested["size"], stage.seed)
    with follow(stage.folder, "autoencoder", settings.training_images(splits["train"])):
        return run_on_accelerator(stage.resources, train_autoencoder, *arguments)


def train_autoencoder(folder: Folder, table: Folder, settings: AutoencoderSettings, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    model = create_autoencoder(settings, size).to(device())
    trained = settings.space == "latent" and settings.pretrained is None
    seen = 0
    if trained:
        reader, learner = ImageReader([(table, "train")], seed), Reconstruction(model, settings).to(device())
        seen = settings.training_images(reader.n)
        train_small_network(learner, lambda batch, progress: learner.loss(batch.inputs, progress),
                            settings, reader, seed, folder)
    model.eval()
    train, test, examples = (decode_images(draw_rows(table, n, seed, ["image"], split))
                          for n, split in ((SAMPLED_IMAGES, "train"), (SAMPLED_IMAGES, "test"), (GRID_IMAGES, "test")))
    share = set_statistics(model, train, settings.batch)
    metrics = {} if settings.space == "pixel" else measure(model, test, settings.batch)
    save_reconstructions(folder, model, examples)
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"space": settings.space, "posterior_share": float(f"{share:.4g}"),
                      "parameters": sum(p.numel() for p in model.parameters()),
                      "trained_images": seen}


@torch.no_grad()
def measure(model: ModelMixin, images: np.ndarray, batch: int) -> Metrics:
    """Of reconstructions of uint8 images (N, 1, H, W), in batches: PSNR (dB) over all pixels, mean MS-SSIM, mean KL
    (nats per image), and the differences between the power spectra (dB)."""
    psnr, similarities, divergences, reconstructions = PeakSignalNoiseRatio(data_range=1.0), [], [], []
    weights = scale_weights(images.shape[-1])
    for chunk in (images[i : i + batch] for i in range(0, len(images), batch)):
        with autocast():
            posterior = model.encode(to_model_range(chunk, model)).latent_dist
        decoded, real = decode_latents(model, posterior.mean), torch.from_numpy(chunk).float() / 255
        psnr.update(decoded, real)
        similarities.append(compute_ms_ssim(decoded, real, 2, data_range=1.0, kernel_size=KERNEL, weights=weights))
        divergences.append(posterior.kl().float())
        reconstructions.append((decoded * 255).round().to(torch.uint8))
    spectra = spectrum_error(power_spectrum(torch.from_numpy(images)), power_spectrum(torch.cat(reconstructions)))
    return {"psnr": round(psnr.compute().item(), 3), "ms_ssim": round(torch.cat(similarities).mean().item(), 4),
            "kl": round(torch.cat(divergences).mean().item(), 2),
            **{name: round(value, 3) for name, value in spectra.items()}}


def save_reconstructions(folder: Folder, model: ModelMixin, images: np.ndarray) -> None:
    """reconstructions.png: originals above, reconstructions below."""
    from torchvision.utils import save_image

    rows = torch.cat([torch.from_numpy(images).float() / 255, reconstruct(model, images)])
    with tempfile.TemporaryDirectory() as staging_dir:
        file = Path(staging_dir) / "reconstructions.png"
        save_image(rows, str(file), nrow=len(images))
        folder.write(file.name, file.read_bytes())
