"""Groups of duplicate images, by content or by near-equal perceptual hash, in linear time and memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

BITS = 256
KEY_BITS = 56  # of a band, at most: with the shift within a byte they fit into 64
PAIRS = 1 << 20  # collected before they are merged
NEIGHBOURS = 48  # compared with each image of a band; more share a key only among very many near-identical images


def duplicate_groups(ids: Sequence[str] | np.ndarray, hashes: np.ndarray | None, radius: int | None) -> np.ndarray:
    """Number of the group of duplicates that each image belongs to, int (N,).

    Args:
        ids: equal if and only if the contents are.
        hashes: perceptual hashes, uint8 (N, 32), or None to use ids only.
        radius: Hamming distance of near-duplicates, at most; None to use ids only.
    """
    _, group = np.unique(np.asarray(ids), return_inverse=True)
    if radius is None or hashes is None or not len(group):
        return group
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for one, other in near_pairs(hashes, radius):
        apart = group[one] != group[other]
        waiting.append((one[apart], other[apart]))
        if sum(len(pairs[0]) for pairs in waiting) > PAIRS:
            group, waiting = merged_groups(group, _all(waiting)), []
    return merged_groups(group, _all(waiting)) if waiting else group


def _all(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([one for one, _ in pairs]), np.concatenate([other for _, other in pairs])


def merged_groups(group: np.ndarray, links: np.ndarray | tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Numbers of the connected components of a grouping merged with `links`, int (N,).

    Args:
        group: int (N,).
        links: numbers of a second grouping, int (N,), or pairs of rows.
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


def near_pairs(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows whose hashes differ in at most `radius` bits, in batches; a pair may occur several times.

    Split into radius + 1 bands, two such hashes agree in at least one band (Manku, Jain and Sarma, WWW 2007). Sorted by
    a band those that agree are adjacent, and each is compared with the next NEIGHBOURS.
    """
    words = np.ascontiguousarray(hashes).view(np.uint64)
    order = np.lexsort(words.T)  # so that similar hashes are adjacent within equal keys, too
    for start, stop in itertools.pairwise(np.linspace(0, BITS, radius + 2).astype(int).tolist()):
        key = _key(hashes, start, stop)[order]
        by_key = np.argsort(key, kind="stable")
        rows, key = order[by_key], key[by_key]
        for step in range(1, min(NEIGHBOURS, len(key) - 1) + 1):
            same = np.flatnonzero(key[step:] == key[:-step])
            if not len(same):
                break
            one, other = rows[same], rows[same + step]
            bits = sum(np.bitwise_count(words[one, k] ^ words[other, k]).astype(np.int16)
                       for k in range(words.shape[1]))
            near = bits <= radius
            yield one[near], other[near]


def _key(hashes: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The bits [start, stop) of each hash, the first KEY_BITS of them, as uint64 (N,)."""
    first, width = start // 8, min(stop - start, KEY_BITS)
    window = np.zeros((len(hashes), 8), np.uint8)
    taken = hashes[:, first : first + 8]
    window[:, : taken.shape[1]] = taken
    word = window.view(">u8")[:, 0].astype(np.uint64)
    return (word << np.uint64(start % 8)) >> np.uint64(64 - width)
