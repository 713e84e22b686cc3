"""Image encoder whose features condition the generator. Standalone: copied as is into published folders."""

from typing import Any

import timm
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from torch.nn import functional as F


class Encoder(ModelMixin, ConfigMixin):
    """A timm vision transformer on one-channel images, giving one global (CLS) feature per image.

    Args:
        architecture: timm model name; a vision transformer, since it must take `img_size` and `dynamic_img_size`.
        image_size: side in pixels that images are resized to.
        channels: input channels of the network; with 3, the gray image is repeated.
        mean: subtracted from pixels in [0, 1]; one number, or one for each input channel.
        std: the difference is divided by it; as many numbers as `mean`.
        options: further keyword arguments of `timm.create_model`, JSON values only.
    """

    @register_to_config
    def __init__(
        self,
        architecture: str = "vit_tiny_patch16_224",
        image_size: int = 64,
        channels: int = 1,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.25,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        arguments = {"img_size": image_size, "in_chans": channels, "num_classes": 0, "dynamic_img_size": True}
        self.vit = timm.create_model(architecture, pretrained=False, **arguments, **(options or {}))
        self.image_size, self.channels = image_size, channels
        self.mean, self.std = (list(value) if isinstance(value, list | tuple) else [value] for value in (mean, std))

    @property
    def embedding_dim(self) -> int:
        """Width D of the features."""
        return self.vit.num_features

    def forward(self, images: Tensor, resize: bool = True) -> Tensor:
        """Returns the global features (B, D).

        Args:
            images: (B, 1, H, W) floats in [0, 1].
            resize: resize other sizes to `image_size` (bilinear, antialiased). Otherwise, as for the crops of
                multi-crop training, H and W are kept and must be multiples of the patch size.
        """
        return self.vit(self._normalise(images, resize))

    def _normalise(self, images: Tensor, resize: bool = True) -> Tensor:
        size = (self.image_size, self.image_size)
        if resize and images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        channels = [(images - mean) / std for mean, std in zip(self.mean, self.std, strict=True)]
        normalised = torch.cat(channels, dim=1).to(self.vit.patch_embed.proj.weight.dtype)
        return normalised.expand(-1, self.channels, -1, -1)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Returns float32 embeddings (B, D) of `forward`'s images: L2-normalised and scaled by sqrt(D).

        Call `eval()` first if the options set dropout or drop path.
        """
        return _unit_variance(self(images))

    @torch.no_grad()
    @apply_forward_hook
    def embed_patches(self, images: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """Returns `embed`'s embeddings (B, D), and patch features (B, grid * grid, D) in row-major order.

        Patch features are average-pooled to a grid of that side, then normalised like the embedding.
        """
        tokens = self.vit.forward_features(self._normalise(images))
        side = self.image_size // self.vit.patch_embed.patch_size[0]
        patches = tokens[:, self.vit.num_prefix_tokens :].float().transpose(1, 2).unflatten(2, (side, side))
        pooled = F.adaptive_avg_pool2d(patches, grid).flatten(2).transpose(1, 2)
        return _unit_variance(self.vit.forward_head(tokens)), _unit_variance(pooled)


def _unit_variance(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1) * features.shape[-1] ** 0.5
