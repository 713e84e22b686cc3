"""Autoencoders: created or loaded, encoding images and decoding latents."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor

from cluster.errors import UserError
from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.settings import AutoencoderSettings
from pipelines.generator.standalone.pixel_vae import Pixels
from pipelines.learning.precision import autocast, to_device
from pipelines.learning.weights import load_model


def new_autoencoder(settings: AutoencoderSettings, size: int) -> AutoencoderKL:
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
def set_statistics(model: ModelMixin, images: np.ndarray, batch: int) -> float:
    """Store the mean and standard deviation of every latent channel, by which the generator normalises latents.

    They are those of latents sampled from the posteriors, so that the variance includes the posterior variance.

    Returns:
        The posterior variance as a fraction of a channel's variance, for the channel where it is largest.
    """
    with autocast():
        posteriors = [model.encode(to_model_range(images[i : i + batch], model)).latent_dist
                      for i in range(0, len(images), batch)]
    means, variances = (torch.cat([getattr(p, name).float() for p in posteriors]) for name in ("mean", "var"))
    deviation = (means.var((0, 2, 3)) + variances.mean((0, 2, 3))).sqrt()
    model.register_to_config(latents_mean=means.mean((0, 2, 3)).tolist(), latents_std=deviation.tolist(),
                             scaling_factor=1.0, sample_size=images.shape[-1])
    return (variances.mean((0, 2, 3)) / deviation.square()).max().item()


@torch.no_grad()
def reconstruct(model: ModelMixin, images: np.ndarray) -> Tensor:
    """Posterior-mean reconstructions, floats in [0, 1] (B, 1, H, W) in CPU memory."""
    with autocast():
        return decode_latents(model, model.encode(to_model_range(images, model)).latent_dist.mean)


@torch.no_grad()
def decode_latents(model: ModelMixin, latents: Tensor) -> Tensor:
    """Images of latents (B, c, h, w) on the model's device, floats in [0, 1] (B, 1, H, W) in CPU memory."""
    with autocast():
        decoded = model.decode(latents).sample
    return (decoded.float().mean(1, keepdim=True) / 2 + 0.5).clamp(0, 1).cpu()


def load_autoencoder(folder: Folder) -> ModelMixin:
    config = (folder / "model").read_json("config.json") or {}
    return load_model(folder, Pixels if config.get("_class_name") == Pixels.__name__ else AutoencoderKL)


def create_autoencoder(settings: AutoencoderSettings, size: int) -> ModelMixin:
    """The autoencoder of the settings, for images of `size` pixels.  Raises UserError if it cannot be downloaded."""
    if settings.space == "pixel":
        return Pixels(sample_size=size)
    if not settings.pretrained:
        return new_autoencoder(settings, size)
    try:
        return AutoencoderKL.from_pretrained(settings.pretrained)
    except OSError as error:
        raise UserError(f"autoencoder.pretrained={settings.pretrained}: {error}") from error


def to_model_range(images: np.ndarray, model: ModelMixin) -> Tensor:
    """uint8 (B, 1, H, W) in CPU memory to floats in [-1, 1] on the device, with the model's number of channels."""
    return (to_device(images, device()) * 2 - 1).expand(-1, model.config.in_channels, -1, -1)
