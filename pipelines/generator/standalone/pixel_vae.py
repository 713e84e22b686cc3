"""An identity autoencoder, for diffusion in pixel space. Standalone: copied as is into published folders."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor, nn


class Pixels(ModelMixin, ConfigMixin):
    """The interface of AutoencoderKL over one-channel images, for diffusion in pixel space.

    Args:
        sample_size: side of the images in pixels.
        latents_mean: mean of the pixels in [-1, 1], by which the denoiser's data are normalised.
        latents_std: their standard deviation.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        latents_mean: tuple[float] | list[float] = (0.0,),
        latents_std: tuple[float] | list[float] = (1.0,),
        in_channels: int = 1,
        latent_channels: int = 1,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.place = nn.Buffer(torch.zeros(1))  # carries the module's device and dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    @property
    def device(self) -> torch.device:
        return self.place.device

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        """Images (B, 1, H, W) as a deterministic posterior."""
        return AutoencoderKLOutput(DiagonalGaussianDistribution(
            torch.cat([images, torch.full_like(images, -30.0)], dim=1), deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(latents)
