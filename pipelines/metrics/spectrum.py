"""Whether images have as much detail as real ones, at every scale."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_PIXELS = 2**24  # pixels transformed at a time: 128 MiB of complex64


def power_spectrum(images: Tensor) -> Tensor:
    """Radially averaged power spectrum of square images, under a Hann window, which hides the jump at the edges.

    Args:
        images: uint8 tensor (N, 1, S, S), on the device to compute on.

    Returns:
        (S // 2,) float64: the mean power at the frequencies 1, 2 ... S // 2 cycles per side, in gray levels squared.

    Raises:
        ValueError: wrong dtype or shape, no image, or a side below 4 px.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be uint8 of shape (N, 1, S, S), got {images.dtype} {tuple(images.shape)}")
    side = images.shape[-1]
    if len(images) == 0 or side < 4:
        raise ValueError(f"a spectrum needs an image of at least 4 px per side, got {tuple(images.shape)}")
    window = torch.hann_window(side, periodic=True, device=images.device)
    window = window[:, None] * window
    power = torch.zeros(side, side // 2 + 1, dtype=torch.float64, device=images.device)
    for chunk in images.split(max(1, MAX_PIXELS // side**2)):
        pixels = chunk[:, 0].float()
        pixels = pixels - pixels.mean((1, 2), keepdim=True)
        power += torch.fft.rfft2(pixels * window, norm="ortho").abs().square().double().sum(0)
    across = torch.fft.rfftfreq(side, 1 / side, device=images.device)
    down = torch.fft.fftfreq(side, 1 / side, device=images.device)
    ring = (across.square() + down.square()[:, None]).sqrt().round().long().flatten()
    sums = torch.bincount(ring, power.flatten())
    return (sums / torch.bincount(ring))[1 : side // 2 + 1] / len(images)


def spectrum_error(real: Tensor, other: Tensor) -> dict[str, float]:
    """Differences between the power spectra (S // 2,) of two sets of images, in decibels.

    - spectrum_error: root mean square over all frequencies, octave by octave; 0 for equal spectra.
    - detail: mean over the upper half of the frequencies; below 0 the images are smoother than the real ones.
    """
    ratio = 10 * torch.log10(other.clamp(min=1e-12) / real.clamp(min=1e-12))
    weight = 1 / torch.arange(1, len(ratio) + 1, dtype=ratio.dtype, device=ratio.device)
    return {"spectrum_error": float(((ratio.square() * weight).sum() / weight.sum()).sqrt()),
            "detail": float(ratio[len(ratio) // 2 :].mean())}
