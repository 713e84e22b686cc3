import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pipelines.metrics import diversity
from pipelines.metrics.diversity import WEIGHTS, ms_ssim, sample_pairs, scale_weights

SIZES = [28, 64, 224]


def noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)


def smooth(count: int, size: int) -> torch.Tensor:
    return interpolate(noise(count, 4).float(), size=(size, size), mode="bicubic").clamp(0, 255).byte()


@pytest.mark.parametrize("size", SIZES)
def test_equal_images_score_one_and_noise_scores_low(size):
    assert ms_ssim(smooth(1, size).repeat(5, 1, 1, 1), pairs=8, seed=0) == pytest.approx(1, abs=1e-5)
    assert ms_ssim(noise(6, size), pairs=8, seed=0) < 0.2


@pytest.mark.parametrize("size", SIZES)
def test_score_falls_as_images_differ_more(size):
    images, shared = smooth(6, size).float(), smooth(7, size)[-1:].float()
    scores = [ms_ssim((shared + share * (images - shared)).byte(), pairs=10, seed=0) for share in (0.2, 0.6, 1.0)]
    assert 1 > scores[0] > scores[1] > scores[2]


@pytest.mark.parametrize(
    ("side", "scales"), [(11, 1), (21, 1), (22, 2), (28, 2), (44, 3), (64, 3), (98, 3), (99, 4), (176, 5), (224, 5)]
)
def test_number_of_scales_fits_the_image(side, scales):
    weights = scale_weights(side)
    assert len(weights) == scales
    assert sum(weights) == pytest.approx(1)
    assert weights[-1] / weights[0] == pytest.approx(WEIGHTS[scales - 1] / WEIGHTS[0])
    assert 0 <= ms_ssim(noise(2, side), pairs=1, seed=0) <= 1


def test_rectangular_images_use_the_shorter_side():
    assert 0 <= ms_ssim(noise(3, 64)[..., :28], pairs=3, seed=0) <= 1


def test_pairs_are_distinct_and_every_pair_can_be_drawn():
    low, high = sample_pairs(40, 780, seed=3)
    assert set(zip(low.tolist(), high.tolist(), strict=True)) == {(i, j) for j in range(40) for i in range(j)}
    low, high = sample_pairs(1_000_000, 500, seed=3)
    assert np.all((low >= 0) & (low < high) & (high < 1_000_000))
    assert len(set(zip(low.tolist(), high.tolist(), strict=True))) == 500
    assert len(sample_pairs(4, 100, seed=0)[0]) == 6


def test_same_seed_same_score_whatever_the_batch(monkeypatch):
    images = smooth(12, 28)
    score = ms_ssim(images, pairs=9, seed=1)
    assert ms_ssim(images, pairs=9, seed=1) == score
    assert ms_ssim(images, pairs=9, seed=2) != score
    monkeypatch.setattr(diversity, "MAX_PIXELS", 1)
    assert ms_ssim(images, pairs=9, seed=1) == pytest.approx(score, abs=1e-6)


def test_bad_input_is_rejected():
    images = noise(3, 28)
    with pytest.raises(ValueError, match="at least 2 images"):
        ms_ssim(images[:1], pairs=1, seed=0)
    with pytest.raises(ValueError, match="pairs"):
        ms_ssim(images, pairs=0, seed=0)
    with pytest.raises(ValueError, match="uint8"):
        ms_ssim(images.float(), pairs=1, seed=0)
    with pytest.raises(ValueError, match="uint8"):
        ms_ssim(images[:, 0], pairs=1, seed=0)
    with pytest.raises(ValueError, match="at least 11 px"):
        ms_ssim(noise(3, 10), pairs=1, seed=0)
