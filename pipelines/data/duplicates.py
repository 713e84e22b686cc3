"""Which images show the same picture: equal by content, or nearly so by perceptual hash, in time and memory linear
in their number."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

BITS = 256
NEIGHBOURS = 48  # compared with each image of a band; there are more with one key only among very many alike


def groups(ids: Sequence[str], hashes: np.ndarray | None, radius: int | None) -> np.ndarray:
    """Number of the group of equal pictures that each image belongs to, int (N,).

    Args:
        ids: Equal where contents are.
        hashes: Perceptual hashes, uint8 (N, 32), or None to go by ids alone.
        radius: Bits that hashes of near-duplicates differ in, at most; None to go by ids alone.
    """
    _, exact = np.unique(np.asarray(ids), return_inverse=True)
    if radius is None or hashes is None or not len(exact):
        return exact
    return joined(exact, near_pairs(hashes, radius))


def joined(group: np.ndarray, links: np.ndarray | tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Numbers of the connected parts when what is in one group belongs together, and so do `links`.

    Args:
        group: int (N,).
        links: Numbers of a second grouping, int (N,), or pairs of rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = np.arange(len(group))
    if isinstance(links, np.ndarray):
        links = rows, _first(links)
    ends = np.concatenate([rows, links[0]]), np.concatenate([_first(group), links[1]])
    graph = coo_array((np.ones(len(ends[0]), bool), ends), shape=(len(rows), len(rows)))
    return connected_components(graph, directed=False)[1]


def _first(group: np.ndarray) -> np.ndarray:
    """For each row the first row of its group."""
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    return first[inverse]


def near_pairs(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pairs whose hashes differ in no more than `radius` bits.

    Cut into radius + 1 bands, two such hashes agree in one band at least (Manku, Jain and Sarma, WWW 2007). In each
    band those that agree are neighbours in order, and each is compared with the next NEIGHBOURS.
    """
    words = np.ascontiguousarray(hashes).view(np.uint64)
    order = np.lexsort(words.T)  # so that those alike lie side by side within a band's key too
    bits = np.unpackbits(np.ascontiguousarray(hashes[order]), axis=1)
    edges = np.linspace(0, BITS, radius + 2).astype(int)
    found = []
    for start, stop in itertools.pairwise(edges):
        key = bits[:, start:stop] @ (1 << np.arange(stop - start, dtype=np.int64))
        rows = order[np.argsort(key, kind="stable")]
        key = np.sort(key)
        for step in range(1, min(NEIGHBOURS, len(key) - 1) + 1):
            same = np.flatnonzero(key[step:] == key[:-step])
            if not len(same):
                break
            one, other = rows[same], rows[same + step]
            near = np.bitwise_count(words[one] ^ words[other]).sum(1) <= radius
            found.append(np.stack([one[near], other[near]]))
    pairs = np.concatenate(found, axis=1) if found else np.zeros((2, 0), np.int64)
    return pairs[0], pairs[1]
