"""The power spectrum of images whose spectrum is known."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from pipelines.metrics import spectrum
from pipelines.metrics.spectrum import power_spectrum, spectrum_error


def noise(spread: float, side: int = 32, n: int = 200) -> torch.Tensor:
    drawn = 128 + spread * torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0))
    return drawn.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("frequency", [3, 9, 14])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_wave_has_its_power_at_its_frequency(frequency, axis):
    wave = 128 + 100 * torch.sin(2 * torch.pi * frequency * torch.arange(32) / 32)
    image = wave.round().to(torch.uint8).expand(1, 1, 32, 32)
    power = power_spectrum(image if axis else image.mT)
    assert power.argmax() == frequency - 1
    assert power.shape == (16,)


def test_white_noise_is_flat_and_twice_the_noise_is_6_db_more():
    power = power_spectrum(noise(20))
    window = torch.hann_window(32)
    expected = 20**2 * window.square().mean() ** 2
    assert power.numpy() == pytest.approx(expected.item(), rel=0.05)
    error = spectrum_error(power, power_spectrum(noise(40)))
    assert [error["spectrum_error"], error["detail"]] == pytest.approx([6.02, 6.02], abs=0.1)


def test_blurred_images_lack_detail_and_equal_ones_lack_nothing():
    images = noise(20)
    error = spectrum_error(power_spectrum(images), power_spectrum(gaussian_blur(images, [3, 3], [0.6, 0.6])))
    assert error["detail"] < -5
    assert 0 < error["spectrum_error"] < -error["detail"]
    assert spectrum_error(power_spectrum(images), power_spectrum(images.flip(0))) == {"spectrum_error": 0, "detail": 0}


def test_the_spectrum_does_not_depend_on_how_many_images_are_transformed_at_a_time(monkeypatch):
    whole = power_spectrum(noise(20))
    monkeypatch.setattr(spectrum, "MAX_PIXELS", 7 * 32**2)
    assert torch.allclose(power_spectrum(noise(20)), whole)


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8), torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
                                    torch.zeros(2, 1, 8, 9, dtype=torch.uint8), torch.zeros(1, 1, 2, 2).byte()])
def test_other_tensors_are_refused(images):
    with pytest.raises(ValueError, match=str(tuple(images.shape)).replace("(", r"\(").replace(")", r"\)")):
        power_spectrum(images)
