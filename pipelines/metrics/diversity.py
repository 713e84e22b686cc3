"""How much the images of one set differ from each other."""

from __future__ import annotations

import numpy as np
import torch
from monai.metrics import compute_ms_ssim
from torch import Tensor

KERNEL = 11
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
MAX_PIXELS = 2**22  # pixels of one side of a batch of pairs: about 16 MiB in float32


def scale_weights(side: int) -> tuple[float, ...]:
    """Weights, summing to 1, of the MS-SSIM scales that an image of this shorter side (pixels) has room for.

    Scale s halves the image s times and must keep the 11-pixel window inside it. MONAI moreover asks for
    side // s^2 >= 11 at the coarsest scale. The first weights of Wang et al. 2003 are renormalised: 2 scales from
    22 px (28 px), 3 from 44 px (64 px), 4 from 99 px, and the standard 5 from 176 px (224 px). Values at different
    numbers of scales are not comparable.

    Raises:
        ValueError: the side is shorter than the window.
    """
    scales = sum(side // max(2**s, s**2) >= KERNEL for s in range(len(WEIGHTS)))
    if scales == 0:
        raise ValueError(f"MS-SSIM needs images of at least {KERNEL} px per side, got {side}")
    total = sum(WEIGHTS[:scales])
    return tuple(weight / total for weight in WEIGHTS[:scales])


def sample_pairs(count: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw distinct unordered pairs of different indices below `count`; all of them where fewer than `pairs` exist."""
    total = count * (count - 1) // 2
    code = np.random.default_rng(seed).choice(total, size=min(pairs, total), replace=False)
    high = ((1 + np.sqrt(1 + 8 * code.astype(np.float64))) / 2).astype(np.int64)
    return code - high * (high - 1) // 2, high


def ms_ssim(images: Tensor, pairs: int, seed: int) -> float:
    """Mean multi-scale structural similarity (Wang et al. 2003) over random pairs of one set of images.

    Lower means more diverse; 1 means all images are equal. Used this way to detect mode collapse by Odena et al.
    2017. Compare with the value of real images of the same size, as chest X-rays resemble each other. Small images
    take fewer scales, see `scale_weights`. Negative structure terms are clipped to 0. The pairs depend on `seed`
    alone; the value depends on the device only through float32 rounding.

    Args:
        images: uint8 tensor (N, 1, H, W), on the device to compute on.
        pairs: number of distinct pairs to average over; all N (N - 1) / 2 where there are fewer.
        seed: seed of the pairs.

    Returns:
        The mean, from 0 to 1.

    Raises:
        ValueError: wrong dtype or shape, fewer than 2 images, fewer than 1 pair, or a side below 11 px.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images must be uint8 of shape (N, 1, H, W), got {images.dtype} {tuple(images.shape)}")
    if len(images) < 2:
        raise ValueError(f"diversity needs at least 2 images, got {len(images)}")
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    height, width = images.shape[2:]
    weights = scale_weights(min(height, width))
    left, right = (torch.from_numpy(index).to(images.device) for index in sample_pairs(len(images), pairs, seed))
    total = 0.0
    batch = max(1, MAX_PIXELS // (height * width))
    for start in range(0, len(left), batch):
        pair = slice(start, start + batch)
        first, second = images[left[pair]].float(), images[right[pair]].float()
        values = compute_ms_ssim(first, second, 2, data_range=255.0, kernel_size=KERNEL, weights=weights)
        total += float(values.double().sum())
    return total / len(left)
