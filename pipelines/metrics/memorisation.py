"""Whether synthetic images lie closer to the training images than fresh real images do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipelines.metrics.fidelity import check_features, distance_blocks

COPY_QUANTILE = 0.01


def nearest_neighbours(train: Iterable[Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest training row of each query row, with one block of training rows in memory at a time.

    Args:
        train: blocks (N_b, D) of features.
        query: (M, D) features.

    Returns:
        Euclidean distance (M,) in feature units, and int64 row of all of `train` (M,), both on the device of `query`.

    Raises:
        ValueError: an empty set, different D, or NaN or infinite features.
    """
    best, index, seen = torch.full((len(query),), torch.inf), torch.zeros(len(query), dtype=torch.int64), 0
    best, index = best.to(query.device), index.to(query.device)
    for block in train:
        if not len(block):
            continue
        rows, against = check_features(query=query, train=block)
        dtype = torch.promote_types(rows.dtype, against.dtype)
        best = best.to(dtype)
        for start, distances in distance_blocks(rows.to(dtype), against.to(dtype)):
            nearest, nearest_rows = distances.min(dim=1)
            queries = slice(start, start + len(nearest))
            closer = nearest < best[queries]
            best[queries] = torch.where(closer, nearest, best[queries])
            index[queries] = torch.where(closer, nearest_rows + seen, index[queries])
        seen += len(against)
    if min(seen, len(query)) < 1:
        raise ValueError(f"nearest neighbours of {len(query)} query rows in {seen} training rows do not exist")
    return best, index


def _share_below(distance: Tensor, reference: Tensor) -> float:
    threshold = torch.quantile(reference, COPY_QUANTILE)
    return float((distance <= threshold).double().mean())


def memorisation(synthetic: Tensor, held_out: Tensor) -> dict[str, float]:
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
        synthetic: (M,) distances of the generated images to their nearest training images, by `nearest_neighbours`.
        held_out: (H,) the same of real images not trained on, H >= 4, in any order.

    Returns:
        nearest_median: median synthetic -> train distance, in feature units.
        nearest_floor_median: median held-out -> train distance.
        copies: share of synthetic rows that count as copies.
        copies_floor: the same share for real images, cross-fitted: the even rows of `held_out` against the threshold
            of the odd rows and the reverse, averaged.

    Raises:
        ValueError: fewer than 4 held-out distances, or no synthetic one.
    """
    if len(held_out) < 4:
        raise ValueError(f"the floor needs at least 4 held-out rows, better several hundred, got {len(held_out)}")
    if len(synthetic) < 1:
        raise ValueError("nothing to compare: 0 synthetic rows")
    even, odd = held_out[::2], held_out[1::2]
    return {
        "nearest_median": float(synthetic.median()),
        "nearest_floor_median": float(held_out.median()),
        "copies": _share_below(synthetic, held_out),
        "copies_floor": (_share_below(even, odd) + _share_below(odd, even)) / 2,
    }
