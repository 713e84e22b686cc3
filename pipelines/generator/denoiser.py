"""The network that training shards: a diffusers UNet and the conditioner that feeds its cross-attention."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pipelines.generator.components.conditioner import Conditioner
from pipelines.settings import Denoiser as DenoiserSettings


class Denoiser(nn.Module):
    """UNet and conditioner as one module, so that one engine holds all trained parameters."""

    def __init__(self, unet: UNet2DConditionModel, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Sequence[Tensor]) -> Tensor:
        """Prediction (B, c, h, w) for noisy latents; `condition` are the arguments of `Conditioner.forward`."""
        return self.unet(noisy, timesteps, encoder_hidden_states=self.conditioner(*condition)).sample


def build(settings: DenoiserSettings, latent: tuple[int, int, int], embedding_dim: int, labels: list[str]) -> Denoiser:
    """A denoiser for latents (channels, height, width) conditioned on embeddings of width `embedding_dim`."""
    channels, height, width = latent
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in settings.attention)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(settings.attention))
    unet = UNet2DConditionModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(settings.channels),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=settings.layers,
        attention_head_dim=tuple(max(c // settings.head_dim, 1) for c in settings.channels),  # the number of heads
        norm_num_groups=settings.norm_groups,
        cross_attention_dim=settings.cross_attention_dim,
    )
    labels = labels if settings.use_labels else []
    return Denoiser(unet, Conditioner(embedding_dim, settings.cross_attention_dim, settings.embedding_tokens, labels))
