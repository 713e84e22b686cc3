"""Turns an image embedding and labels into cross-attention tokens. Standalone: copied as is into published folders."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Conditioner(ModelMixin, ConfigMixin):
    """Projects an embedding to `embedding_tokens` tokens and labels, where there are any, to one more.

    Each of the two has a learned null that stands in where it is dropped. Every parameter takes part in every
    `forward`, whatever is dropped, so gradients never go missing under DDP or ZeRO.

    Args:
        embedding_dim: width E of the image embedding.
        cross_attention_dim: width C of a token, the U-Net's `cross_attention_dim`.
        embedding_tokens: tokens one embedding becomes.
        labels: label names in the order of the multi-hot columns (`config.labels`); empty for no label token.

    Raises:
        ValueError: on a size below 1 or a repeated label name.
    """

    @register_to_config
    def __init__(
        self,
        embedding_dim: int,
        cross_attention_dim: int,
        embedding_tokens: int = 4,
        labels: tuple[str, ...] | list[str] = (),
    ) -> None:
        super().__init__()
        if min(embedding_dim, cross_attention_dim, embedding_tokens) < 1:
            raise ValueError("embedding_dim, cross_attention_dim and embedding_tokens must be at least 1")
        if len(set(labels)) != len(labels):
            raise ValueError(f"label names repeat: {list(labels)}")
        self.norm = nn.LayerNorm(embedding_dim)
        self.embedding_proj = nn.Linear(embedding_dim, embedding_tokens * cross_attention_dim)
        self.null_embedding = nn.Parameter(torch.randn(1, embedding_tokens, cross_attention_dim) * 0.02)
        self.label_proj = nn.Linear(len(labels), cross_attention_dim) if labels else None
        self.null_label = nn.Parameter(torch.randn(1, 1, cross_attention_dim) * 0.02) if labels else None

    def forward(self, embedding: Tensor, labels: Tensor, drop_embedding: Tensor, drop_labels: Tensor) -> Tensor:
        """Returns the condition tokens (B, T, C) in the parameters' dtype; T counts the label token if there is one.

        Args:
            embedding: (B, E) floats of any scale; finite also where dropped.
            labels: (B, L) multi-hot floats; ignored (may be (B, 0)) where the conditioner has no labels.
            drop_embedding: (B,) bools, True where the null tokens stand in for the embedding.
            drop_labels: (B,) bools, True where the null token stands in for the labels.
        """
        dtype = self.null_embedding.dtype
        projected = self.embedding_proj(self.norm(embedding.to(dtype))).unflatten(1, self.null_embedding.shape[1:])
        tokens = torch.where(drop_embedding[:, None, None], self.null_embedding.to(projected.dtype), projected)
        if self.label_proj is None or self.null_label is None:
            return tokens
        label = self.label_proj(labels.to(dtype)).unsqueeze(1)
        label = torch.where(drop_labels[:, None, None], self.null_label.to(label.dtype), label)
        return torch.cat([tokens, label], dim=1)

    def null(self, batch: int) -> Tensor:
        """Returns the tokens (batch, T, C) of the null condition: neither embedding nor labels."""
        label = [] if self.null_label is None else [self.null_label]
        return torch.cat([self.null_embedding, *label], dim=1).expand(batch, -1, -1)
