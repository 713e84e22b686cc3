"""Stage `autoencoder`: diffusers' AutoencoderKL, named on the Hub or trained here on the train split."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from cluster.session import compute, device
from cluster.storage import Folder
from pipelines.data.split import check_filled
from pipelines.data.tables import pixels, read_table
from pipelines.generator.fit import CHECKPOINT, autocast, fit, to_device
from pipelines.generator.weights import load_model, save_model
from pipelines.progress import follow
from pipelines.settings import Autoencoder
from pipelines.stage import Metrics, Stage

STATISTICS_IMAGES = 2_000  # enough for the mean and deviation of a latent channel
SHOWN = 8


def autoencoder(stage: Stage) -> Metrics:
    """Returns PSNR (dB) and the mean KL (nats an image) on the test split, and the size."""
    settings = stage.settings.autoencoder
    work = (stage.folder, stage.input("ingest") / "images", settings, stage.settings.data.size, stage.settings.seed)
    splits = stage.metrics_of("ingest")["splits"]
    check_filled(splits)
    with follow(stage.folder, "autoencoder", settings.total(splits["train"])):
        return compute(stage.resources, _make, *work)


def _make(folder: Folder, table: Folder, settings: Autoencoder, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    train = pixels(read_table(table, ["image"], "train"))
    model = (AutoencoderKL.from_pretrained(settings.pretrained) if settings.pretrained else build(settings, size))
    model = model.to(device())
    if not settings.pretrained:
        fit(model, lambda rows, progress: reconstruction_loss(model, train[rows], settings), settings, len(train), seed,
            folder)
    model.eval()
    set_statistics(model, train[:: -(-len(train) // STATISTICS_IMAGES)], settings.batch)
    test = pixels(read_table(table, ["image"], "test"))
    metrics = measure(model, test, settings.batch)
    save_pictures(folder, model, test[:SHOWN])
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"parameters": sum(p.numel() for p in model.parameters()), "trained_images":
                      0 if settings.pretrained else settings.total(len(train))}


def build(settings: Autoencoder, size: int) -> AutoencoderKL:
    """A one-channel AutoencoderKL that halves the side at every level but the last."""
    levels = len(settings.channels)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=settings.latent_channels,
        block_out_channels=settings.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=size,
        scaling_factor=1.0,
    )


def in_range(images: np.ndarray, model: AutoencoderKL) -> Tensor:
    """uint8 (B, 1, H, W) on the host to floats in [-1, 1] on the device, with the model's number of channels."""
    return (to_device(images, device()) * 2 - 1).expand(-1, model.config.in_channels, -1, -1)


def reconstruction_loss(model: AutoencoderKL, images: np.ndarray, settings: Autoencoder) -> dict[str, Tensor]:
    """Mean absolute and squared error, and KL per pixel (Rombach et al. 2022, arXiv 2112.10752, without its GAN)."""
    target = in_range(images, model)
    posterior = model.encode(target).latent_dist
    error = model.decode(posterior.sample()).sample.float() - target
    kl = posterior.kl().float().mean() / target[0].numel()
    reconstruction = error.abs().mean() + error.square().mean()
    return {"loss": reconstruction + settings.kl_weight * kl, "reconstruction": reconstruction.detach(),
            "kl": kl.detach()}


@torch.no_grad()
def set_statistics(model: AutoencoderKL, images: np.ndarray, batch: int) -> None:
    """Store the mean and deviation of every latent channel, by which the generator's latents are normalised."""
    with autocast():
        means = torch.cat([model.encode(in_range(images[i : i + batch], model)).latent_dist.mean.float()
                           for i in range(0, len(images), batch)])
    model.register_to_config(latents_mean=means.mean((0, 2, 3)).tolist(), latents_std=means.std((0, 2, 3)).tolist(),
                             scaling_factor=1.0, sample_size=images.shape[-1])


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior-mean reconstructions, floats in [0, 1] (B, 1, H, W) on the host."""
    with autocast():
        return pictures(model, model.encode(in_range(images, model)).latent_dist.mean)


@torch.no_grad()
def pictures(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """What latents (B, c, h, w) on the model's device show, floats in [0, 1] (B, 1, H, W) on the host."""
    with autocast():
        decoded = model.decode(latents).sample
    return (decoded.float().mean(1, keepdim=True) / 2 + 0.5).clamp(0, 1).cpu()


@torch.no_grad()
def measure(model: AutoencoderKL, images: np.ndarray, batch: int) -> Metrics:
    chunks = [images[i : i + batch] for i in range(0, len(images), batch)]
    found = torch.cat([reconstruct(model, chunk) for chunk in chunks])
    psnr = peak_signal_noise_ratio(found, torch.from_numpy(images).float() / 255, data_range=1.0)
    with autocast():
        kl = torch.cat([model.encode(in_range(chunk, model)).latent_dist.kl().float() for chunk in chunks]).mean()
    return {"psnr": round(psnr.item(), 3), "kl": round(kl.item(), 2)}


def save_pictures(folder: Folder, model: AutoencoderKL, images: np.ndarray) -> None:
    """reconstructions.png: originals above, reconstructions below."""
    import os

    from torchvision.utils import save_image

    rows = torch.cat([torch.from_numpy(images).float() / 255, reconstruct(model, images)])
    with tempfile.TemporaryDirectory() as aside:
        save_image(rows, os.path.join(aside, "r.png"), nrow=len(images))
        with open(os.path.join(aside, "r.png"), "rb") as file:
            folder.write("reconstructions.png", file.read())


def load_autoencoder(folder: Folder) -> AutoencoderKL:
    return load_model(folder, AutoencoderKL)
