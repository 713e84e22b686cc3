"""Whether synthetic images lie closer to the training images than fresh real images do."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.metrics.fidelity import check_features, distance_blocks

COPY_QUANTILE = 0.01


def _nearest(train: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(train.dtype, query.dtype)
    nearest = [distances.min(dim=1) for _, distances in distance_blocks(query.to(dtype), train.to(dtype))]
    return torch.cat([block.values for block in nearest]), torch.cat([block.indices for block in nearest])


def nearest_neighbours(train: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest training row of each query row, in bounded memory.

    Args:
        train: (N, D) features.
        query: (M, D) features.

    Returns:
        Euclidean distance (M,) in feature units, and int64 row of `train` (M,), both on the device of `train`.

    Raises:
        ValueError: an empty set, different D, or NaN or infinite features.
    """
    train, query = check_features(train=train, query=query)
    if min(len(train), len(query)) < 1:
        raise ValueError(f"nearest neighbours of {len(query)} query rows in {len(train)} training rows do not exist")
    return _nearest(train, query)


def _share_below(distance: Tensor, reference: Tensor) -> float:
    threshold = torch.quantile(reference, COPY_QUANTILE)
    return float((distance <= threshold).double().mean())


def memorisation(train: Tensor, synthetic: Tensor, held_out: Tensor) -> dict[str, float | Tensor]:
    """Compare synthetic -> train with held-out -> train nearest-neighbour distances.

    A three-sample comparison after Meehan et al. 2020 ("A Non-Parametric Test to Detect Data-Copying in Generative
    Models"); Carlini et al. 2023 ("Extracting Training Data from Diffusion Models") likewise look for generated
    images unusually near to a training image. It is a heuristic: it gives no differential-privacy guarantee and no
    bound on an attacker, it sees only copies that the features place close by, and van den Burg & Williams 2021
    ("On Memorization in Probabilistic Deep Generative Models") show memorisation that nearest neighbours miss. The
    held-out images must come from the distribution of the training images and share no patient with them.

    A synthetic row counts as a copy when its distance is at most the 1st percentile of the held-out distances. A
    generator that draws fresh images scores about 0.01. Sampling error raises that by up to about 1 / H for H held-out
    rows, and `copies_floor` by about 2 / H: with fewer than a few hundred, read `copies` only against `copies_floor`.

    Args:
        train: (N, D) features of the training images.
        synthetic: (M, D) features of the generated images.
        held_out: (H, D) features of real images not trained on, H >= 4, in any order.

    Returns:
        nearest_median: median synthetic -> train distance, in feature units.
        nearest_floor_median: median held-out -> train distance.
        copies: share of synthetic rows that count as copies.
        copies_floor: the same share for real images, cross-fitted: the even rows of `held_out` against the threshold
            of the odd rows and the reverse, averaged.
        nearest_distance: (M,) synthetic -> train distances.
        nearest_index: (M,) int64 rows of `train` at those distances.

    Raises:
        ValueError: fewer than 4 held-out rows, an empty set, different D, or NaN or infinite features.
    """
    train, synthetic, held_out = check_features(train=train, synthetic=synthetic, held_out=held_out)
    if len(held_out) < 4:
        raise ValueError(f"the floor needs at least 4 held-out rows, better several hundred, got {len(held_out)}")
    if min(len(train), len(synthetic)) < 1:
        raise ValueError(f"nothing to compare: {len(synthetic)} synthetic and {len(train)} training rows")
    distance, index = _nearest(train, synthetic)
    floor, _ = _nearest(train, held_out)
    even, odd = floor[::2], floor[1::2]
    return {
        "nearest_median": float(distance.median()),
        "nearest_floor_median": float(floor.median()),
        "copies": _share_below(distance, floor),
        "copies_floor": (_share_below(even, odd) + _share_below(odd, even)) / 2,
        "nearest_distance": distance,
        "nearest_index": index,
    }
