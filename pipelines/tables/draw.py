"""Seeded, stratified samples of a table's rows for statistics, probes and figures, with bounded reads.

Rows are ranked by a hash of the seed and their image_id, so that the sample of a small table does not depend on how its
rows are distributed over shards. From a table of many shards, some shards are sampled first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from cluster.storage import Folder
from pipelines.tables.parquet import AHEAD, column_shards, read_ahead, read_split

SHARDS = 64  # sampled from a larger table, plus those that a rare stratum needs


def draw_rows(folder: Folder, n: int, seed: int, columns: Sequence[str], split: str | None = None,
              by: str | None = "source", used: np.ndarray | None = None) -> pa.Table:
    """`iterate_drawn` as one table, for samples that fit in memory."""
    tables = list(iterate_drawn(folder, n, seed, columns, split, by, used))
    return pa.concat_tables(tables) if tables else pa.table({column: [] for column in columns})


def iterate_drawn(folder: Folder, n: int, seed: int, columns: Sequence[str], split: str | None = None,
                  by: str | None = "source", used: np.ndarray | None = None) -> Iterator[pa.Table]:
    """Columns of `n` sampled rows (all if there are fewer), one table per shard that holds some, in the table's order.

    Args:
        by: column to stratify by, proportionally and with at least one row per value; None: no strata.
        used: bool (rows of `split`,): whether a row may be sampled; None: all.
    """
    drawn = drawn_rows(folder, n, seed, split, by, used)
    return read_ahead(lambda name: read_split(folder, name, columns, split).take(drawn[name]), drawn, AHEAD)


def drawn_rows(folder: Folder, n: int, seed: int, split: str | None, by: str | None,
               used: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Ascending indices of the sampled rows among each shard's rows of `split`, by the shard's name."""
    known = column_shards(folder, ["image_id", *([by] if by else [])], split)
    ends = np.cumsum([table.num_rows for table in known.values()])
    allowed = np.split(np.ones(ends[-1] if len(ends) else 0, bool) if used is None else used, ends[:-1])
    places = {name: np.flatnonzero(part) for name, part in zip(known, allowed, strict=False) if part.any()}
    names, sizes = list(places), [len(rows) for rows in places.values()]
    if sum(sizes) <= n:
        return places
    shards = {name: known[name].take(rows) for name, rows in places.items()}
    strata = [table[by].to_pylist() if by else [None] * table.num_rows for table in shards.values()]
    values = {value: k for k, value in enumerate(sorted({v for found in strata for v in found}, key=str))}
    codes = [np.array([values[value] for value in found]) for found in strata]
    counts = np.stack([np.bincount(code, minlength=len(values)) for code in codes])  # (shards, strata)
    quotas = shares(counts.sum(0), n)
    chosen = np.arange(len(names)) if len(names) <= SHARDS else drawn_shards(names, counts, quotas, seed)
    stratum = np.concatenate([codes[k] for k in chosen])
    rank = np.concatenate([ranks(shards[names[k]]["image_id"].to_pylist(), seed) for k in chosen])
    taken = np.zeros(len(rank), bool)
    for k, quota in enumerate(quotas):
        rows = np.flatnonzero(stratum == k)
        taken[rows[np.argsort(rank[rows], kind="stable")[:quota]]] = True
    ends = np.cumsum([sizes[k] for k in chosen])[:-1]
    drawn = zip([names[k] for k in chosen], np.split(taken, ends), strict=True)
    return {name: places[name][part] for name, part in drawn if part.any()}


def shares(counts: np.ndarray, n: int) -> np.ndarray:
    """`n` (below the sum of `counts`) apportioned to `counts`, at least one to each while n suffices."""
    rare = (counts > 0) & (counts * n < counts.sum()) if n >= np.count_nonzero(counts) else np.zeros(len(counts), bool)
    common = np.where(rare, 0, counts)
    exact = np.where(rare, 1, common * ((n - rare.sum()) / common.sum()))
    found = np.floor(exact).astype(int)
    found[np.argsort(-(exact % 1), kind="stable")[: n - found.sum()]] += 1
    return found


def drawn_shards(names: Sequence[str], counts: np.ndarray, quotas: np.ndarray, seed: int) -> np.ndarray:
    """Ascending indices of the shards to sample from: a proportional part of SHARDS per stratum, enough for its quota.

    Shards of a stratum are drawn without replacement with probability by its rows in them (Efraimidis & Spirakis 2006).

    Args:
        counts: rows (shards, strata).
    """
    uniform = (ranks(names, seed).astype(np.float64) + 1) / 2**64
    chosen: set[int] = set()
    for rows, quota in zip(counts.T, quotas, strict=True):
        if quota:
            order = np.argsort(np.log(uniform) / np.maximum(rows, 1e-9), kind="stable")[::-1]
            needed = int(np.searchsorted(np.cumsum(rows[order]), quota)) + 1
            chosen |= set(order[: max(needed, math.floor(SHARDS * rows.sum() / counts.sum()))].tolist())
    return np.array(sorted(chosen))


def ranks(names: Sequence[str], seed: int) -> np.ndarray:
    """Hash of the seed and each name, uint64 (N,)."""
    key = str(seed).encode()
    digests = (hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(b"".join(digests), np.uint64)
