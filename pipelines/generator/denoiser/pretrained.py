"""A denoiser that starts from a published UNet, such as Stable Diffusion's, fitted to other latents and conditions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from cluster.errors import UserError

UNSUPPORTED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds",
               "time_cond_proj_dim")


def published_config(name: str) -> dict[str, Any]:
    """Config of a published UNet2DConditionModel.

    Args:
        name: Hub id or folder of the UNet, or of a pipeline with one in `unet/`.

    Raises:
        UserError: it cannot be read, is another network, or needs inputs that this project's denoisers do not have (as
            SDXL's does).
    """
    config = _read(UNet2DConditionModel.load_config, name)
    if (kind := config.get("_class_name")) != UNet2DConditionModel.__name__:
        raise UserError(f"denoiser.pretrained={name} is a {kind}, not a {UNet2DConditionModel.__name__}")
    if needed := [key for key in UNSUPPORTED if config.get(key) is not None]:
        raise UserError(f"denoiser.pretrained={name} has other conditions than cross-attention ({', '.join(needed)}); "
                        "Stable Diffusion 1 and 2 have not")
    return config


def load_pretrained(network: UNet2DConditionModel, name: str) -> None:
    """Load published weights into a network of the same architecture but for its inputs, outputs and token width.

    The first convolution takes the weights of as many channels as the latents have; those of a mask are zero, so that
    it changes nothing at first. Other layers of another shape (cross-attention to tokens of another width, the last
    convolution for another number of latent channels) keep their initialisation.
    """
    published = _read(UNet2DConditionModel.from_pretrained, name, use_safetensors=True).state_dict()
    own = network.state_dict()
    fitting = {key: value for key, value in published.items() if value.shape == own[key].shape}
    first, latent_channels = published["conv_in.weight"], network.config.out_channels
    fitting["conv_in.weight"] = torch.zeros_like(own["conv_in.weight"])
    fitting["conv_in.weight"][:, : min(latent_channels, first.shape[1])] = first[:, :latent_channels]
    network.load_state_dict(fitting, strict=False)


def _read(method: Any, name: str, **options: Any) -> Any:
    """What a method of UNet2DConditionModel reads of `name`, from its `unet/` if it has one."""
    try:
        return method(name, subfolder="unet", **options)
    except (OSError, ValueError) as within_pipeline:
        try:
            return method(name, **options)
        except (OSError, ValueError) as alone:
            raise UserError(f"denoiser.pretrained={name}: {alone}; and in its unet/: {within_pipeline}") from alone
