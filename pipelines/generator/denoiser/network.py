"""The trained module: a diffusers UNet or DiT, and the conditioner that encodes its conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from cluster.errors import UserError
from pipelines.data.structures import pixel_values
from pipelines.generator.settings import ConditionSettings, DenoiserSettings
from pipelines.generator.standalone.conditioner import Conditioner

Latent = tuple[int, int, int]  # channels, height, width


class Denoiser(nn.Module):
    """Network and conditioner as one module, which holds all trained parameters."""

    def __init__(self, network: ModelMixin, conditioner: Conditioner) -> None:
        super().__init__()
        self.network, self.conditioner = network, conditioner

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor],
                dropped: dict[str, Tensor]) -> Tensor:
        """Prediction (B, c, h, w) for noisy latents (B, c, h, w) and timesteps (B,).

        Args:
            conditions, dropped: as in `Conditioner.forward`.
        """
        tokens = self.conditioner(conditions, dropped).expand(len(noisy), -1, -1)
        return self.network(self.conditioner.concat_mask(noisy, conditions, dropped), timestep=timesteps,
                            encoder_hidden_states=tokens.to(noisy.dtype)).sample


def build_denoiser(settings: DenoiserSettings, condition: ConditionSettings, latent: Latent,
                   shapes: dict[str, tuple[int, ...]], labels: list[str], structures: Sequence[str] = (),
                   published: dict[str, Any] | None = None) -> Denoiser:
    """A denoiser with newly initialised weights.

    Args:
        latent: shape for one image.
        shapes: of one image's conditions in the latents table; the embedding is always present.
        labels: the findings, in the order of their columns.
        structures: names of the mask channels.
        published: config of the published UNet whose architecture is used.

    Raises:
        UserError: denoiser.patch does not divide the side of the latent.
    """
    conditioner = Conditioner(
        settings.cross_attention_dim, *shapes["embedding"], embedding_tokens=condition.embedding_tokens,
        patch_tokens=shapes["patches"][0] if condition.patches else 0,
        labels=labels if condition.labels else [],
        structures={name: list(pixel_values(name)) for name in structures} if condition.mask else {},
    )
    inputs = latent[0] + conditioner.mask_channels
    if published:
        network = UNet2DConditionModel.from_config(published | {
            "sample_size": latent[1], "in_channels": inputs, "out_channels": latent[0],
            "cross_attention_dim": settings.cross_attention_dim})
    else:
        network = {"unet": unet, "dit": dit}[settings.architecture](settings, latent, inputs)
    return Denoiser(network, conditioner)


def unet(settings: DenoiserSettings, latent: Latent, inputs: int) -> UNet2DConditionModel:
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in settings.attention)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(settings.attention))
    adaptive: dict[str, Any] = {
        "resnet_time_scale_shift": "scale_shift",
        "addition_embed_type": "text",  # the tokens, pooled by attention, are added to the time embedding
        "addition_embed_type_num_heads": settings.cross_attention_dim // math.gcd(settings.cross_attention_dim, 64),
    } if settings.adaptive_norm else {}
    return UNet2DConditionModel(
        sample_size=latent[1],
        in_channels=inputs,
        out_channels=latent[0],
        block_out_channels=tuple(settings.channels),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=settings.layers,
        attention_head_dim=tuple(max(c // settings.head_dim, 1) for c in settings.channels),  # the number of heads
        norm_num_groups=settings.norm_groups,
        cross_attention_dim=settings.cross_attention_dim,
        **adaptive,
    )


def dit(settings: DenoiserSettings, latent: Latent, inputs: int) -> PixArtTransformer2DModel:
    channels, side, _ = latent
    if side % settings.patch:
        raise UserError(f"denoiser.patch={settings.patch} does not divide the side of the latents, {side}")
    model = PixArtTransformer2DModel(
        sample_size=side,
        in_channels=inputs,
        out_channels=channels,
        patch_size=settings.patch,
        num_layers=settings.layers,
        num_attention_heads=settings.width // settings.head_dim,
        attention_head_dim=settings.head_dim,
        cross_attention_dim=settings.cross_attention_dim,
        use_additional_conditions=False,
    )
    _initialise(model)
    return model


def _initialise(model: PixArtTransformer2DModel) -> None:
    """Initialise as PixArt-alpha does (Chen et al. 2023, arXiv 2310.00426), which diffusers leaves to checkpoints: the
    output projections of cross-attention and the last layer start at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.view(model.inner_dim, -1))
    embedder = model.adaln_single.emb.timestep_embedder
    for layer in (embedder.linear_1, embedder.linear_2, model.adaln_single.linear):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (model.proj_out, *(block.attn2.to_out[0] for block in model.transformer_blocks)):
        nn.init.zeros_(layer.weight)


def compile_blocks(network: ModelMixin) -> None:
    """torch.compile each repeated block by itself: the speed of compiling the full network in a tenth of the time."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    torch._dynamo.config.recompile_limit = 128  # blocks of one class and of different sizes share one cache
    for module in network.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile(dynamic=False)


def training_flops(denoiser: Denoiser, latent: Latent) -> int:
    """Floating-point operations of one image in one training step: forward, and twice that backward.

    Counted by torch on meta tensors; a multiply-add counts as two.
    """
    import copy

    from torch.utils.flop_counter import FlopCounterMode

    meta_denoiser = copy.deepcopy(denoiser).to("meta").requires_grad_(False)
    shapes = {name: tuple(latent[1] if side < 0 else side for side in shape)
              for name, shape in meta_denoiser.conditioner.shapes.items()}
    conditions = {name: torch.zeros(1, *shape, device="meta") for name, shape in shapes.items()}
    dropped = {name: torch.zeros(1, dtype=torch.bool, device="meta") for name in shapes}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_denoiser(torch.zeros(1, *latent, device="meta"), torch.zeros(1, device="meta"), conditions, dropped)
    return 3 * counter.get_total_flops()
