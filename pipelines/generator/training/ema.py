"""Exponential moving average of the fp32 weights, each worker averaging the partition it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RAMP_UP = 0.05  # early on the half-life is this share of the images seen (EDM2, Karras et al. 2024, arXiv 2312.02696)

PIECE = 2**24  # elements of a difference held at a time: 64 MiB


def average_name(halflife: int) -> str:
    """Of an average's part of a checkpoint."""
    return f"ema-{halflife}"


class Ema:
    """Average of flat partitions, whatever the ZeRO stage cut them into; the half-life is counted in images."""

    def __init__(self, partitions: Sequence[Tensor], halflife_images: int) -> None:
        self.partitions, self.halflife = list(partitions), halflife_images
        self.name = average_name(halflife_images)
        self.averages = [partition.clone() for partition in partitions]

    @torch.no_grad()
    def update(self, batch: int, seen: int) -> None:
        """Take in the weights after a step of `batch` images that brought the total to `seen`."""
        halflife = max(min(self.halflife, seen * RAMP_UP), 1e-8)
        torch._foreach_lerp_(self.averages, self.partitions, 1 - 0.5 ** (batch / halflife))

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Squared norm, over this worker's partitions, of average minus weights."""
        pieces = [squared_norm([one - other]) for average, weights in zip(self.averages, self.partitions, strict=True)
                  for one, other in zip(average.flatten().split(PIECE), weights.flatten().split(PIECE), strict=True)]
        return torch.stack(pieces).sum()


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
