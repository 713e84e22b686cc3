"""Turns what is known of an image into what a denoiser is conditioned on. Standalone: copied as is into published
folders."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Tokens(nn.Module):
    """Vectors (B, N, inputs) as (B, N * count, width) cross-attention tokens, or a learned null in their place."""

    def __init__(self, inputs: int, vectors: int, count: int, width: int, normalised: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs) if normalised else nn.Identity()
        self.project = nn.Linear(inputs, count * width)
        self.place = nn.Parameter(torch.zeros(1, vectors * count, width)) if vectors > 1 else None
        self.null = nn.Parameter(torch.randn(1, vectors * count, width) * 0.02)

    def forward(self, vectors: Tensor, drop: Tensor) -> Tensor:
        """Tokens in the parameters' dtype; `drop` (B,) is True where the null stands in."""
        projected = self.project(self.norm(vectors.to(self.null.dtype))).reshape(-1, *self.null.shape[1:])
        if self.place is not None:
            projected = projected + self.place
        return torch.where(drop[:, None, None], self.null.to(projected.dtype), projected)


class Conditioner(ModelMixin, ConfigMixin):
    """An image embedding, patch features and labels as cross-attention tokens; a mask as channels beside the noise.

    A label is 1 (the finding is present), 0 (absent) or -1 (unknown), and enters as two numbers, present and absent, so
    that unknown is neither. Where all labels are unknown the null stands in, as where they are dropped.

    Every parameter takes part in every call, whatever is dropped, so gradients never go missing under DDP or ZeRO.
    Without any token there is a constant one.

    Args:
        cross_attention_dim: width C of a token, the denoiser's `cross_attention_dim`.
        embedding_dim: width E of the image embedding.
        embedding_tokens: tokens one embedding becomes; 0 for none.
        patch_tokens: patch features of width E, one token each; 0 for none.
        labels: names of the findings in the order of the columns (`config.labels`); empty for no label token.
        structures: of each channel of the mask its name and the values of its pixels in a map of numbers
            (`config.structures`); empty for no mask.

    Raises:
        ValueError: on a negative size, a width below 1 or a repeated label name.
    """

    @register_to_config
    def __init__(
        self,
        cross_attention_dim: int,
        embedding_dim: int,
        embedding_tokens: int = 4,
        patch_tokens: int = 0,
        labels: tuple[str, ...] | list[str] = (),
        structures: dict[str, list[int]] | None = None,
    ) -> None:
        super().__init__()
        if min(cross_attention_dim, embedding_dim) < 1 or min(embedding_tokens, patch_tokens) < 0:
            raise ValueError("cross_attention_dim and embedding_dim must be at least 1, the counts not negative")
        if len(set(labels)) != len(labels):
            raise ValueError(f"label names repeat: {list(labels)}")
        width, self.parts = cross_attention_dim, nn.ModuleDict()
        if embedding_tokens:
            self.parts["embedding"] = Tokens(embedding_dim, 1, embedding_tokens, width, normalised=True)
        if patch_tokens:
            self.parts["patches"] = Tokens(embedding_dim, patch_tokens, 1, width, normalised=True)
        if labels:
            self.parts["labels"] = Tokens(2 * len(labels), 1, 1, width, normalised=False)
        self.constant = None if self.parts else nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.null_mask = nn.Parameter(torch.zeros(1, len(structures), 1, 1)) if structures else None

    @property
    def mask_channels(self) -> int:
        return 0 if self.null_mask is None else self.null_mask.shape[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The conditions this generator knows and the shape of each for one image; a mask's sides are the latent's."""
        config = self.config
        known = {"embedding": (config.embedding_dim,), "patches": (config.patch_tokens, config.embedding_dim),
                 "labels": (len(config.labels),)}
        shapes = {name: known[name] for name in self.parts}
        return shapes if self.null_mask is None else shapes | {"mask": (self.mask_channels, -1, -1)}

    def forward(self, given: dict[str, Tensor], drop: dict[str, Tensor]) -> Tensor:
        """Returns the condition tokens (B, T, C) in the parameters' dtype.

        Args:
            given: floats (B, ...) for every name of `shapes`, finite also where dropped; labels are 1, 0 or -1.
            drop: bools (B,) for every name of `shapes`, True where the null stands in.
        """
        if self.constant is not None:
            batch = len(next(iter(drop.values()))) if drop else 1
            return self.constant.expand(batch, -1, -1)
        if "labels" in self.parts:
            states = given["labels"]
            given = given | {"labels": torch.cat([states.clamp(min=0), (1 - states) * (states >= 0)], dim=1)}
            drop = drop | {"labels": drop["labels"] | (states < 0).all(1)}
        return torch.cat([part(_rows(given[name]), drop[name]) for name, part in self.parts.items()], dim=1)

    def beside(self, noisy: Tensor, given: dict[str, Tensor], drop: dict[str, Tensor]) -> Tensor:
        """Returns the denoiser's input: `noisy` (B, c, h, w), and the K channels of the mask where there is one.

        A channel of negative values is a structure that is not known: the null stands in as where the mask is dropped.
        """
        if self.null_mask is None:
            return noisy
        unknown = drop["mask"][:, None] | (given["mask"].flatten(2).amin(2) < 0)
        mask = torch.where(unknown[:, :, None, None], self.null_mask, given["mask"].to(self.null_mask.dtype))
        return torch.cat([noisy, mask.to(noisy.dtype)], dim=1)


def _rows(value: Tensor) -> Tensor:
    """(B, inputs) or (B, N, inputs) as the latter."""
    return value if value.ndim == 3 else value.unsqueeze(1)
