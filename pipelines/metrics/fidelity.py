"""How close a synthetic set lies to a real one, measured on feature vectors of the two sets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from monai.metrics.fid import get_fid_score
from torch import Tensor

MAX_ROWS = 2048
MAX_DISTANCES = 2**26  # entries of one distance block: 256 MiB in float32


def check_features(**sets: Tensor) -> list[Tensor]:
    """Return feature sets as float tensors on the device of the first.

    Args:
        sets: tensors of shape (rows, D), by the name to use in messages. Half precision is widened to float32.

    Raises:
        ValueError: a set is not two-dimensional or holds NaN or infinity, or the sets differ in D.
    """
    device = next(iter(sets.values())).device
    checked: list[Tensor] = []
    for name, features in sets.items():
        if features.ndim != 2:
            raise ValueError(f"{name} features must have shape (rows, D), got {tuple(features.shape)}")
        features = features.detach().to(device)
        if features.dtype != torch.float64:
            features = features.float()
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features)).any(dim=1).sum())
            raise ValueError(
                f"{bad} of {len(features)} {name} feature rows hold NaN or infinity: look for blank images or a "
                "half-precision overflow in the feature extractor"
            )
        if checked and features.shape[1] != checked[0].shape[1]:
            raise ValueError(
                f"{name} features have D={features.shape[1]}, the others D={checked[0].shape[1]}: "
                "use one feature extractor for all sets"
            )
        checked.append(features)
    return checked


def distance_blocks(query: Tensor, reference: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, Euclidean distances (rows, N)) over consecutive rows of `query` (M, D) to `reference` (N, D).

    A block has at most MAX_ROWS rows and about MAX_DISTANCES entries. Differences are squared directly, not expanded
    into a matrix product, so that equal vectors are at distance exactly 0.
    """
    rows = max(1, min(MAX_ROWS, MAX_DISTANCES // len(reference)))
    for start in range(0, len(query), rows):
        block = query[start : start + rows]
        yield start, torch.cdist(block, reference, compute_mode="donot_use_mm_for_euclid_dist")


def frechet_distance(real: Tensor, synthetic: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, the "FID" formula).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), computed by MONAI in float64. The features are first divided by one
    common scale, and the result multiplied back, since MONAI's tolerance for rounding error is absolute and would
    reject large rank-deficient features. Covariances may be rank-deficient (fewer rows than D), but the distance is
    biased upwards at small sizes (Chong & Forsyth 2020): compare values only at equal sizes.

    Args:
        real: (N, D) features, D >= 2.
        synthetic: (M, D) features.

    Returns:
        The distance in squared feature units, 0 when the two sets are equal.

    Raises:
        ValueError: fewer than 2 rows in a set, D < 2, different D, or NaN or infinite features.
    """
    real, synthetic = check_features(real=real, synthetic=synthetic)
    if min(len(real), len(synthetic)) < 2:
        raise ValueError(
            f"a covariance needs at least 2 rows per set, got {len(real)} real and {len(synthetic)} synthetic: "
            "evaluate more images (thousands for a stable distance)"
        )
    if real.shape[1] < 2:
        raise ValueError("the Fréchet distance here needs features with D >= 2")
    real, synthetic = real.double(), synthetic.double()
    centre = real.mean(dim=0)
    scale = torch.cat([real, synthetic]).sub_(centre).square().sum(dim=1).mean().sqrt()
    if scale == 0:
        return 0.0
    distance = get_fid_score((synthetic - centre) / scale, (real - centre) / scale)
    return max(0.0, float(distance) * float(scale) ** 2)


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance (N,) of each row to its k-th nearest other row."""
    radii = []
    for start, distances in distance_blocks(features, features):
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, start + rows] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def prdc(real: Tensor, synthetic: Tensor, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Each row carries a closed ball that reaches its k-th nearest neighbour in its own set.

    - precision: share of synthetic rows inside some real ball.
    - recall: share of real rows inside some synthetic ball.
    - density: real balls around a synthetic row, divided by k, averaged. May exceed 1; it is (k + 1) / k for two
      equal sets without ties and about 1 for two samples of one distribution.
    - coverage: share of real balls that hold some synthetic row.

    Time is O((N + M)^2 D); memory is bounded by one distance block.

    Args:
        real: (N, D) features.
        synthetic: (M, D) features.
        k: neighbour whose distance is the radius, 1 <= k < min(N, M).

    Raises:
        ValueError: k out of range, different D, or NaN or infinite features.
    """
    real, synthetic = check_features(real=real, synthetic=synthetic)
    if not 1 <= k < min(len(real), len(synthetic)):
        raise ValueError(
            f"k={k} must be at least 1 and smaller than both sets, got {len(real)} real and {len(synthetic)} "
            "synthetic rows: lower k or evaluate more images"
        )
    dtype = torch.promote_types(real.dtype, synthetic.dtype)
    real, synthetic = real.to(dtype), synthetic.to(dtype)
    real_radii, synthetic_radii = _radii(real, k), _radii(synthetic, k)
    precise = balls = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for start, distances in distance_blocks(synthetic, real):
        inside = distances <= real_radii
        precise += int(inside.any(dim=1).sum())
        balls += int(inside.sum())
        covered |= inside.any(dim=0)
        recalled |= (distances <= synthetic_radii[start : start + len(distances), None]).any(dim=0)
    return {
        "precision": precise / len(synthetic),
        "recall": int(recalled.sum()) / len(real),
        "density": balls / (k * len(synthetic)),
        "coverage": int(covered.sum()) / len(real),
    }
