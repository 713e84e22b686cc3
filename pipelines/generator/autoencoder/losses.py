"""Losses of the autoencoder: reconstruction, spectrum, KL, and optionally a perceptual and an adversarial loss
(Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from monai.losses import PatchAdversarialLoss, PerceptualLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.errors import UserError
from pipelines.generator.autoencoder.model import to_model_range
from pipelines.generator.settings import AutoencoderSettings

WINDOW = 16  # side of a window of the spectral loss, in pixels
LOG_WEIGHT = 0.05  # of the logarithms' term
ROUNDING = 1e-6  # power of the rounding to 8 bits in one coefficient of a window, for values in [-1, 1]
DISCRIMINATOR = {"num_layers_d": 3, "channels": 32}


class Reconstruction(nn.Module):
    """Autoencoder, perceptual loss and discriminator as one module, trained by one optimizer.

    Raises UserError if the weights of the perceptual network cannot be downloaded.
    """

    def __init__(self, model: AutoencoderKL, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.perceptual = _perceptual(settings.perceptual) if settings.perceptual else None
        self.discriminator = PatchDiscriminator(2, in_channels=1, **DISCRIMINATOR) \
            if settings.adversarial_weight else None

    def loss(self, images: np.ndarray, progress: float) -> dict[str, Tensor]:
        """Named scalars for uint8 images (B, 1, H, W) at `progress` of training in [0, 1]; "loss" is minimised."""
        settings, target = self.settings, to_model_range(images, self.model)
        posterior = self.model.encode(target).latent_dist
        reconstruction = self.model.decode(posterior.sample()).sample.float()
        error = reconstruction - target
        kl = posterior.kl().float().mean() / target[0].numel()
        parts = {"reconstruction": error.abs().mean() + error.square().mean(), "kl": kl}
        loss = parts["reconstruction"] + settings.kl_weight * kl
        if settings.spectral_weight:
            parts["spectral"] = spectral_loss(reconstruction, target)
            loss = loss + settings.spectral_weight * parts["spectral"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(reconstruction, target).float()
            loss = loss + settings.perceptual_weight * parts["perceptual"]
        if self.discriminator is not None and progress >= settings.adversarial_start:
            parts["generator_loss"], parts["discriminator_loss"] = self._adversarial(reconstruction, target)
            loss = loss + settings.adversarial_weight * parts["generator_loss"] \
                + parts["discriminator_loss"]
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def _adversarial(self, reconstruction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the autoencoder and of the discriminator; neither has gradients for the other's weights."""
        discriminator, adversarial_loss = self.discriminator, PatchAdversarialLoss(criterion="least_squares")
        assert discriminator is not None

        def discriminate(images: Tensor) -> Tensor:
            return discriminator(images.mean(1, keepdim=True).contiguous())[-1].float()

        discriminator.requires_grad_(False)
        generator_loss = adversarial_loss(discriminate(reconstruction), target_is_real=True, for_discriminator=False)
        discriminator.requires_grad_(True)
        fake = adversarial_loss(discriminate(reconstruction.detach()), target_is_real=False, for_discriminator=True)
        real = adversarial_loss(discriminate(target), target_is_real=True, for_discriminator=True)
        return generator_loss, (fake + real) / 2


def spectral_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Difference between the amplitude spectra of images (B, C, H, W) in [-1, 1], in overlapping windows.

    Mean absolute difference of amplitudes and of their logarithms: the STFT loss of audio synthesis (Yamamoto et al.
    2020, arXiv 1910.11480) in two dimensions. Where the position of fine detail is lost in the latent, losses of pixels
    prefer its mean, which is smooth; this one asks for detail of the right strength.
    """
    fake, real = (_amplitudes(images) for images in (reconstruction, target))
    log_fake, log_real = ((amplitude.square() + ROUNDING).log() for amplitude in (fake, real))
    return F.l1_loss(fake, real) + LOG_WEIGHT * F.l1_loss(log_fake, log_real)


def _amplitudes(images: Tensor) -> Tensor:
    """Amplitudes (B * windows, w, w // 2 + 1) of Hann windows that overlap by half."""
    side = min(WINDOW, images.shape[-1])
    hann = torch.hann_window(side, device=images.device)
    windows = F.unfold(images.mean(1, keepdim=True), side, stride=side // 2).mT.reshape(-1, side, side)
    centred = windows - windows.mean((1, 2), keepdim=True)
    return torch.fft.rfft2(centred * hann[:, None] * hann, norm="ortho").abs()


def _perceptual(network: str) -> nn.Module:
    try:
        return PerceptualLoss(2, network_type=network, is_fake_3d=False).requires_grad_(False).eval()
    except Exception as error:  # downloads of torch, torchvision and MONAI raise different types
        raise UserError(f"autoencoder.perceptual={network}: its weights cannot be downloaded ({error}); choose "
                        "another network of MONAI's PerceptualLoss, or null") from error
