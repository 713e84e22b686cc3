"""Stage `autoencoder`: diffusers' AutoencoderKL, named on the Hub or trained here on the train split; or pixels as
they are (`autoencoder.space=pixel`)."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin
from monai.metrics import compute_ms_ssim
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from cluster.session import compute, device
from cluster.storage import Folder
from pipelines.data.split import check_filled
from pipelines.data.tables import pixels, read_table
from pipelines.evaluate.diversity import KERNEL, scale_weights
from pipelines.generator.components.pixels import Pixels
from pipelines.generator.fit import CHECKPOINT, autocast, fit
from pipelines.generator.reconstruction import Reconstruction, in_range
from pipelines.generator.weights import load_model, save_model
from pipelines.progress import follow
from pipelines.settings import Autoencoder
from pipelines.stage import Metrics, Stage

STATISTICS_IMAGES = 2_000  # enough for the mean and deviation of a latent channel
SHOWN = 8


def autoencoder(stage: Stage) -> Metrics:
    """Returns PSNR (dB), MS-SSIM and the mean KL (nats an image) on the test split, and the size."""
    settings = stage.settings.autoencoder
    work = (stage.folder, stage.input("ingest") / "images", settings, stage.settings.data.size, stage.settings.seed)
    splits = stage.metrics_of("ingest")["splits"]
    check_filled(splits)
    with follow(stage.folder, "autoencoder", settings.total(splits["train"])):
        return compute(stage.resources, _make, *work)


def _make(folder: Folder, table: Folder, settings: Autoencoder, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    train = pixels(read_table(table, ["image"], "train"))
    model = _model(settings, size).to(device())
    trained = settings.space == "latent" and settings.pretrained is None
    if trained:
        learner = Reconstruction(model, settings).to(device())
        fit(learner, lambda rows, progress: learner.loss(train[rows], progress), settings, len(train), seed, folder)
    model.eval()
    set_statistics(model, train[:: -(-len(train) // STATISTICS_IMAGES)], settings.batch)
    test = pixels(read_table(table, ["image"], "test"))
    metrics = {} if settings.space == "pixel" else measure(model, test, settings.batch)
    save_pictures(folder, model, test[:SHOWN])
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"space": settings.space, "parameters": sum(p.numel() for p in model.parameters()),
                      "trained_images": settings.total(len(train)) if trained else 0}


def _model(settings: Autoencoder, size: int) -> ModelMixin:
    if settings.space == "pixel":
        return Pixels(sample_size=size)
    if not settings.pretrained:
        return build(settings, size)
    try:
        return AutoencoderKL.from_pretrained(settings.pretrained)
    except OSError as error:
        raise ValueError(f"autoencoder.pretrained={settings.pretrained}: {error}") from error


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


@torch.no_grad()
def set_statistics(model: ModelMixin, images: np.ndarray, batch: int) -> None:
    """Store the mean and deviation of every latent channel, by which the generator's latents are normalised.

    Those of the latents as they are drawn, with the width of their posteriors.
    """
    with autocast():
        posteriors = [model.encode(in_range(images[i : i + batch], model)).latent_dist
                      for i in range(0, len(images), batch)]
    means, widths = (torch.cat([getattr(p, name).float() for p in posteriors]) for name in ("mean", "var"))
    deviation = (means.var((0, 2, 3)) + widths.mean((0, 2, 3))).sqrt()
    model.register_to_config(latents_mean=means.mean((0, 2, 3)).tolist(), latents_std=deviation.tolist(),
                             scaling_factor=1.0, sample_size=images.shape[-1])


@torch.no_grad()
def reconstruct(model: ModelMixin, images: np.ndarray) -> Tensor:
    """Posterior-mean reconstructions, floats in [0, 1] (B, 1, H, W) on the host."""
    with autocast():
        return pictures(model, model.encode(in_range(images, model)).latent_dist.mean)


@torch.no_grad()
def pictures(model: ModelMixin, latents: Tensor) -> Tensor:
    """What latents (B, c, h, w) on the model's device show, floats in [0, 1] (B, 1, H, W) on the host."""
    with autocast():
        decoded = model.decode(latents).sample
    return (decoded.float().mean(1, keepdim=True) / 2 + 0.5).clamp(0, 1).cpu()


@torch.no_grad()
def measure(model: ModelMixin, images: np.ndarray, batch: int) -> Metrics:
    chunks = [images[i : i + batch] for i in range(0, len(images), batch)]
    found = torch.cat([reconstruct(model, chunk) for chunk in chunks])
    real = torch.from_numpy(images).float() / 255
    psnr = peak_signal_noise_ratio(found, real, data_range=1.0)
    similar = compute_ms_ssim(found, real, 2, data_range=1.0, kernel_size=KERNEL,
                              weights=scale_weights(real.shape[-1])).mean()
    with autocast():
        kl = torch.cat([model.encode(in_range(chunk, model)).latent_dist.kl().float() for chunk in chunks]).mean()
    return {"psnr": round(psnr.item(), 3), "ms_ssim": round(similar.item(), 4), "kl": round(kl.item(), 2)}


def save_pictures(folder: Folder, model: ModelMixin, images: np.ndarray) -> None:
    """reconstructions.png: originals above, reconstructions below."""
    import os

    from torchvision.utils import save_image

    rows = torch.cat([torch.from_numpy(images).float() / 255, reconstruct(model, images)])
    with tempfile.TemporaryDirectory() as aside:
        save_image(rows, os.path.join(aside, "r.png"), nrow=len(images))
        with open(os.path.join(aside, "r.png"), "rb") as file:
            folder.write("reconstructions.png", file.read())


def load_autoencoder(folder: Folder) -> ModelMixin:
    config = (folder / "model").read_json("config.json") or {}
    return load_model(folder, Pixels if config.get("_class_name") == Pixels.__name__ else AutoencoderKL)
