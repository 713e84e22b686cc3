import math

import pytest
import torch

from pipelines.metrics import fidelity
from pipelines.metrics.fidelity import frechet_distance, prdc


def normal(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(rows: int, mean: torch.Tensor, cov: torch.Tensor, seed: int) -> torch.Tensor:
    """A sample whose empirical mean and covariance are exactly those given."""
    sample = normal(rows, len(mean), seed)
    sample = sample - sample.mean(dim=0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(sample.T.cov()), sample.T, upper=False)
    return (torch.linalg.cholesky(cov) @ whitened).T + mean


def nuclear_norm_frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    """tr (C1 C2)^(1/2) as the nuclear norm of A B^T, where C1 = A^T A and C2 = B^T B: no matrix square root."""
    mean = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    a, b = ((z - z.mean(dim=0)) / math.sqrt(len(z) - 1) for z in (x, y))
    return float(mean + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def loop_prdc(real: torch.Tensor, fake: torch.Tensor, k: int) -> dict[str, float]:
    def radius(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    real, fake = real.tolist(), fake.tolist()
    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, i) for i in range(len(fake))]
    in_real = [[math.dist(r, f) <= real_radius[i] for i, r in enumerate(real)] for f in fake]
    in_fake = [[math.dist(r, f) <= fake_radius[j] for j, f in enumerate(fake)] for r in real]
    return {
        "precision": sum(map(any, in_real)) / len(fake),
        "recall": sum(map(any, in_fake)) / len(real),
        "density": sum(map(sum, in_real)) / (k * len(fake)),
        "coverage": sum(any(row[i] for row in in_real) for i in range(len(real))) / len(real),
    }


def test_frechet_of_two_gaussians_with_known_moments():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    first, second = torch.tensor([4.0, 1.0, 9.0]).double(), torch.tensor([1.0, 1.0, 16.0]).double()
    rotation = torch.linalg.qr(normal(3, 3, 0)).Q
    real = with_moments(200, mean, rotation @ torch.diag(first) @ rotation.T, 1)
    fake = with_moments(150, torch.zeros(3).double(), rotation @ torch.diag(second) @ rotation.T, 2)
    expected = float(mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_gaussians_whose_covariances_do_not_commute():
    real, fake = normal(60, 6, 0) @ normal(6, 6, 1), normal(80, 6, 2) @ normal(6, 6, 3)
    assert frechet_distance(real, fake) == pytest.approx(nuclear_norm_frechet(real, fake), rel=1e-8)


def test_frechet_of_equal_sets_is_zero_and_a_shift_adds_its_square():
    real = normal(300, 8, 0)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(real, real + 1000) == pytest.approx(8 * 1000**2, rel=1e-9)
    constant = torch.full((5, 8), 3.0)
    assert frechet_distance(constant, constant) == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_frechet_is_finite_with_fewer_rows_than_dimensions(scale):
    spectrum = torch.linspace(0, -6, 192).double().exp() * scale
    real, fake = normal(20, 192, 0) * spectrum, normal(12, 192, 1) * spectrum * 1.2
    assert frechet_distance(real, fake) == pytest.approx(nuclear_norm_frechet(real, fake), rel=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5 * scale**2)


def test_frechet_rejects_what_has_no_covariance():
    good = normal(10, 4, 0)
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="D >= 2"):
        frechet_distance(good[:, :1], good[:, :1])
    with pytest.raises(ValueError, match="one feature extractor"):
        frechet_distance(good, good[:, :3])
    with pytest.raises(ValueError, match="shape"):
        frechet_distance(good, good[0])


@pytest.mark.parametrize("metric", [frechet_distance, prdc])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_features_are_counted_in_the_error(metric, value):
    good = normal(10, 4, 0)
    bad = good.clone()
    bad[2:5, 1] = value
    with pytest.raises(ValueError, match="3 of 10 synthetic"):
        metric(good, bad)


@pytest.mark.parametrize("block", [1, 7, 2048])
@pytest.mark.parametrize("k", [1, 4])
def test_prdc_equals_the_naive_loop_at_any_block_size(monkeypatch, block, k):
    monkeypatch.setattr(fidelity, "MAX_ROWS", block)
    real, fake = normal(45, 3, 0), normal(38, 3, 1) + 1.2
    result = prdc(real, fake, k)
    assert result == pytest.approx(loop_prdc(real, fake, k), abs=1e-12)
    assert all(0 < result[name] < 1 for name in ("precision", "recall", "coverage"))


def test_blocks_respect_the_entry_budget(monkeypatch):
    monkeypatch.setattr(fidelity, "MAX_DISTANCES", 100)
    blocks = list(fidelity.distance_blocks(normal(25, 2, 0), normal(30, 2, 1)))
    assert [start for start, _ in blocks] == list(range(0, 25, 3))
    assert max(distances.numel() for _, distances in blocks) <= 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prdc_of_equal_sets(dtype):
    real = normal(150, 16, 0).to(dtype)
    result = prdc(real, real, k=4)
    assert result == {"precision": 1, "recall": 1, "density": pytest.approx(5 / 4), "coverage": 1}


def test_prdc_of_disjoint_sets_is_zero():
    assert set(prdc(normal(60, 4, 0), normal(50, 4, 1) + 100).values()) == {0}


def test_prdc_of_two_samples_of_one_distribution():
    result = prdc(normal(500, 8, 0), normal(500, 8, 1))
    assert result["density"] == pytest.approx(1, abs=0.15)
    assert min(result.values()) > 0.8


def test_prdc_separates_mode_collapse_from_bad_samples():
    real = torch.cat([normal(200, 4, 0), normal(200, 4, 1) + 50])
    collapsed = prdc(real, 0.1 * normal(300, 4, 2))
    assert collapsed["precision"] == 1
    assert collapsed["recall"] < 0.05
    assert collapsed["coverage"] < 0.3
    noisy = prdc(real, torch.cat([real, normal(400, 4, 3) + 500]))
    assert noisy["precision"] == pytest.approx(0.5)
    assert noisy["recall"] == noisy["coverage"] == 1


@pytest.mark.parametrize(("n", "m", "k"), [(5, 9, 5), (9, 5, 5), (9, 9, 0)])
def test_prdc_rejects_k_outside_the_sets(n, m, k):
    with pytest.raises(ValueError, match=f"k={k}"):
        prdc(normal(n, 3, 0), normal(m, 3, 1), k)
