"""Exponential moving averages of the fp32 weights; each worker averages the partitions it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Early on, the half-life is this fraction of the images seen (EDM2, Karras et al. 2024, arXiv 2312.02696).
RAMP_UP = 0.05

CHUNK = 2**24  # elements of a difference in memory at a time: 64 MiB


def average_name(halflife: int) -> str:
    """The name of an EMA, and of its part of a checkpoint."""
    return f"ema-{halflife}"


class Ema:
    """EMA of flat partitions, under any ZeRO stage; the half-life is counted in images."""

    def __init__(self, partitions: Sequence[Tensor], halflife_images: int) -> None:
        self.partitions, self.halflife = list(partitions), halflife_images
        self.name = average_name(halflife_images)
        self.averages = [partition.clone() for partition in partitions]

    @torch.no_grad()
    def update(self, batch: int, seen: int) -> None:
        """Update with the weights after a step of `batch` images that brought the total to `seen`."""
        halflife = max(min(self.halflife, seen * RAMP_UP), 1e-8)
        torch._foreach_lerp_(self.averages, self.partitions, 1 - 0.5 ** (batch / halflife))

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Squared norm of EMA minus weights, over this worker's partitions."""
        squares = [squared_norm([a - w]) for average, weights in zip(self.averages, self.partitions, strict=True)
                   for a, w in zip(average.flatten().split(CHUNK), weights.flatten().split(CHUNK), strict=True)]
        return torch.stack(squares).sum()


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
