"""Losses of the autoencoder: reconstruction, KL, and optionally a perceptual and an adversarial loss
(Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import numpy as np
from diffusers import AutoencoderKL
from monai.losses import PatchAdversarialLoss, PerceptualLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn

from cluster.errors import UserError
from pipelines.generator.autoencoder.model import to_model_range
from pipelines.generator.settings import AutoencoderSettings

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


def _perceptual(network: str) -> nn.Module:
    try:
        return PerceptualLoss(2, network_type=network, is_fake_3d=False).requires_grad_(False).eval()
    except Exception as error:  # downloads of torch, torchvision and MONAI raise different types
        raise UserError(f"autoencoder.perceptual={network}: its weights cannot be downloaded ({error}); choose "
                        "another network of MONAI's PerceptualLoss, or null") from error
