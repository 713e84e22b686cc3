"""A denoiser that starts from a published UNet, such as Stable Diffusion's, fitted to other latents and conditions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from cluster.errors import UserError

UNSUPPORTED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def fitted_unet(name: str, **changes: Any) -> UNet2DConditionModel:
    """A newly initialised UNet with the published one's architecture, but for `changes` of its config.

    Args:
        name: Hub id or folder of a UNet2DConditionModel, or of a pipeline with one in `unet/`.

    Raises:
        UserError: it cannot be read, or needs inputs that this project's denoisers do not have (as SDXL's does).
    """
    config = _read(UNet2DConditionModel.load_config, name)
    if needed := [key for key in UNSUPPORTED if config.get(key) is not None]:
        raise UserError(f"denoiser.pretrained={name} has other conditions than cross-attention ({', '.join(needed)}); "
                        "Stable Diffusion 1 and 2 have not")
    return UNet2DConditionModel.from_config(config | changes)


def load_pretrained(network: UNet2DConditionModel, name: str) -> None:
    """Load the published weights into a network made by `fitted_unet`.

    A layer of another shape (cross-attention to tokens of another width, the last convolution for another number of
    latent channels) keeps its initialisation. The first convolution takes the weights of the channels that it shares
    with the published one; those of the others, such as a mask's, are zero, so that they change nothing at first.
    """
    published = _read(UNet2DConditionModel.from_pretrained, name, use_safetensors=True).state_dict()
    own = network.state_dict()
    fitting = {key: value for key, value in published.items() if value.shape == own[key].shape}
    if "conv_in.weight" not in fitting:
        whole, source = torch.zeros_like(own["conv_in.weight"]), published["conv_in.weight"]
        shared = min(whole.shape[1], source.shape[1])
        whole[:, :shared] = source[:, :shared]
        fitting["conv_in.weight"] = whole
    network.load_state_dict(fitting, strict=False)


def _read(method: Any, name: str, **options: Any) -> Any:
    """What a method of UNet2DConditionModel reads of `name`, from its `unet/` if it has one."""
    try:
        try:
            return method(name, subfolder="unet", **options)
        except OSError:
            return method(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"denoiser.pretrained={name}: {error}") from error
