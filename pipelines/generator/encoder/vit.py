"""Vision transformers as image encoders: created with Hub weights, loaded from a stage, applied to images."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from cluster.errors import UserError
from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.learning.precision import autocast, to_device
from pipelines.learning.weights import load_model

# Weights that timm does not list: the architecture, and overrides of timm's pretrained_cfg.
EXTRA_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rad-dino": ("vit_base_patch14_dinov2.lvd142m", {  # Perez-Garcia et al. 2024, arXiv 2401.10815: 0.9 M chest X-rays
        "hf_hub_id": "microsoft/rad-dino", "hf_hub_filename": "backbone_compatible.safetensors",
        "mean": (0.5307,) * 3, "std": (0.2583,) * 3}),
}


def from_timm(name: str, size: int) -> Encoder:
    """A vision transformer with its Hub weights, for gray images of `size` pixels (rounded to whole patches).

    Raises UserError if the model does not exist or its weights cannot be downloaded.
    """
    architecture, overlay = EXTRA_WEIGHTS.get(name, (name, None))
    try:
        with torch.device("meta"):
            template = timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=overlay)
        mean, std = (list(template.pretrained_cfg[key]) for key in ("mean", "std"))  # of red, green and blue
        side = whole_patches(size, template)
        model = Encoder(architecture, side, 3, mean, std)
        source = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0,
                                   img_size=side, dynamic_img_size=True)
    except (RuntimeError, AttributeError, TypeError, OSError) as error:  # raised by timm and the Hub
        raise UserError(f"encoder.pretrained={name}: {error}; use rad-dino, or a timm vision transformer with "
                        "weights on the Hub, such as vit_base_patch14_dinov2.lvd142m") from error
    model.vit.load_state_dict(source.state_dict())
    return model


def whole_patches(size: int, vit: Any) -> int:
    """`size` in pixels, rounded down to whole patches of a timm vision transformer; at least one."""
    patch: int = vit.patch_embed.patch_size[0]
    return max(size // patch, 1) * patch


@torch.no_grad()
def embed(model: Encoder, images: np.ndarray, batch: int) -> Tensor:
    """Embeddings (N, D), float32 in CPU memory, of uint8 images (N, 1, H, W)."""
    with autocast():
        parts = [model.embed(to_device(images[i : i + batch], device())) for i in range(0, len(images), batch)]
    return torch.cat(parts).cpu()


@torch.no_grad()
def embed_patches(model: Encoder, images: np.ndarray, batch: int, grid: int) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) and patch features (N, grid * grid, D), as `embed`."""
    with autocast():
        parts = [model.embed_patches(to_device(images[i : i + batch], device()), grid)
                 for i in range(0, len(images), batch)]
    embeddings, patches = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return embeddings, patches


def load_encoder(folder: Folder) -> Encoder:
    return load_model(folder, Encoder)
