"""Encodes an image's embedding, patch features, labels and mask as a denoiser's conditioning. Standalone: copied as is
into published folders."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Tokens(nn.Module):
    """Vectors (B, N, inputs) as (B, N * count, width) cross-attention tokens, or a learned null token instead."""

    def __init__(self, inputs: int, vectors: int, count: int, width: int, normalised: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs) if normalised else nn.Identity()
        self.project = nn.Linear(inputs, count * width)
        self.place = nn.Parameter(torch.zeros(1, vectors * count, width)) if vectors > 1 else None
        self.null = nn.Parameter(torch.randn(1, vectors * count, width) * 0.02)

    def forward(self, vectors: Tensor, dropped: Tensor) -> Tensor:
        """Tokens in the parameters' dtype; `dropped` (B,) is True where the null replaces them."""
        projected = self.project(self.norm(vectors.to(self.null.dtype))).reshape(-1, *self.null.shape[1:])
        if self.place is not None:
            projected = projected + self.place
        return torch.where(dropped[:, None, None], self.null.to(projected.dtype), projected)


class Conditioner(ModelMixin, ConfigMixin):
    """An image embedding, patch features and labels as cross-attention tokens; a mask as extra input channels.

    A label is 1 (the finding is present), 0 (absent) or -1 (unknown), encoded as two numbers, present and absent, both
    0 if unknown. If all labels are unknown the learned null is used, as if they were dropped.

    Every parameter is used in every call, whatever is dropped, so that all have gradients under DDP and ZeRO.
    Without any condition there is one constant token.

    Args:
        cross_attention_dim: width C of a token, the denoiser's `cross_attention_dim`.
        embedding_dim: width E of the image embedding.
        embedding_tokens: tokens one embedding becomes; 0 for none.
        patch_tokens: patch features of width E, one token each; 0 for none.
        labels: names of the findings in the order of the columns (`config.labels`); empty for no label token.
        structures: the name of each mask channel and its pixel values in a label map (`config.structures`); empty for
            no mask.

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
        """Shape of each condition in use, for one image; a mask has the latent's height and width, given as -1."""
        config = self.config
        known = {"embedding": (config.embedding_dim,), "patches": (config.patch_tokens, config.embedding_dim),
                 "labels": (len(config.labels),)}
        shapes = {name: known[name] for name in self.parts}
        return shapes if self.null_mask is None else shapes | {"mask": (self.mask_channels, -1, -1)}

    def forward(self, conditions: dict[str, Tensor], dropped: dict[str, Tensor]) -> Tensor:
        """Returns the condition tokens (B, T, C) in the parameters' dtype.

        Args:
            conditions: floats (B, ...) for every name of `shapes`, finite even if dropped; labels are 1, 0 or -1.
            dropped: bools (B,) for every name of `shapes`, True where the null is used.
        """
        if self.constant is not None:
            batch = len(next(iter(dropped.values()))) if dropped else 1
            return self.constant.expand(batch, -1, -1)
        if "labels" in self.parts:
            states = conditions["labels"]
            conditions = conditions | {"labels": torch.cat([states.clamp(min=0), (1 - states) * (states >= 0)], dim=1)}
            dropped = dropped | {"labels": dropped["labels"] | (states < 0).all(1)}
        return torch.cat([part(_rows(conditions[name]), dropped[name]) for name, part in self.parts.items()], dim=1)

    def concat_mask(self, noisy: Tensor, conditions: dict[str, Tensor], dropped: dict[str, Tensor]) -> Tensor:
        """Returns the denoiser's input: `noisy` (B, c, h, w), with the K channels of the mask if there is one.

        Negative values mark an unknown structure: its channel is replaced by the null, as if the mask were dropped.
        """
        if self.null_mask is None:
            return noisy
        unknown = dropped["mask"][:, None] | (conditions["mask"].flatten(2).amin(2) < 0)
        mask = torch.where(unknown[:, :, None, None], self.null_mask, conditions["mask"].to(self.null_mask.dtype))
        return torch.cat([noisy, mask.to(noisy.dtype)], dim=1)


def _rows(value: Tensor) -> Tensor:
    """Returns (B, N, inputs) of (B, inputs) or (B, N, inputs)."""
    return value if value.ndim == 3 else value.unsqueeze(1)
