"""Exponential moving averages of the fp32 weights with power-function profiles, and any other from their snapshots.

After Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv 2312.02696).
In the average at time t the weights at time s have the share s**exponent. Its length is the standard deviation of that
profile, relative to t (sigma_rel in EDM2); as time, images seen are counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STORED = (0.05, 0.1)  # lengths of the EMAs that are updated during training, as in EDM2
CHUNK = 2**24  # elements of a difference in memory at a time: 64 MiB


def average_name(length: float) -> str:
    """The name of an EMA, and of its part of a checkpoint."""
    return f"ema-{length:g}"


class Ema:
    """EMA of flat partitions under any ZeRO stage; each worker averages the partitions it owns."""

    def __init__(self, partitions: Sequence[Tensor], length: float) -> None:
        self.partitions, self.exponent = list(partitions), exponent(length)
        self.name = average_name(length)
        self.averages = [partition.clone() for partition in partitions]

    @torch.no_grad()
    def update(self, batch: int, seen: int) -> None:
        """Update with the weights after a step of `batch` images that brought the total to `seen`."""
        torch._foreach_lerp_(self.averages, self.partitions, 1 - (1 - batch / seen) ** (self.exponent + 1))

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Squared norm of EMA minus weights, over this worker's partitions."""
        squares = [squared_norm([a - w]) for average, weights in zip(self.averages, self.partitions, strict=True)
                   for a, w in zip(average.flatten().split(CHUNK), weights.flatten().split(CHUNK), strict=True)]
        return torch.stack(squares).sum()


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()


def exponent(length: float) -> float:
    """Exponent of the profile of this length, which is below that of a plain mean, 12 ** -0.5.

    The largest root of (x + 2)**2 (x + 3) length**2 = x + 1.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def combination(times: Sequence[float], length: float) -> tuple[np.ndarray, float]:
    """The EMA of any length at the last of `times`, as a linear combination of snapshots of the stored EMAs.

    Args:
        times: of the snapshots, ascending.

    Returns:
        Coefficients (len(times), len(STORED)), by least squares of the profile, and the relative error (L2) that
        remains of it.
    """
    exponents = np.array([exponent(stored) for stored in STORED])
    t, x = np.repeat(np.asarray(times, float), len(STORED)), np.tile(exponents, len(times))
    target = exponent(length)
    among, with_target = _product(t[:, None], x[:, None], t, x), _product(t, x, t[-1], target)
    found = np.linalg.lstsq(among, with_target, rcond=None)[0]
    norm = _product(t[-1], target, t[-1], target)
    error = np.sqrt(max(1 + (found @ among @ found - 2 * found @ with_target) / norm, 0))
    return found.reshape(len(times), len(STORED)), float(error)


def _product(t1: np.ndarray, x1: np.ndarray | float, t2: np.ndarray, x2: np.ndarray | float) -> np.ndarray:
    """Inner product of two profiles, which are 0 after their times t1 and t2."""
    first, last = np.minimum(t1, t2), np.maximum(t1, t2)
    return (x1 + 1) * (x2 + 1) / (x1 + x2 + 1) * (first / last) ** np.where(t1 < t2, x2, x1) / last
