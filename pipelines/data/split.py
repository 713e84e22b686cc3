"""Train, val and test by patient, before anything learns from the data."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from pipelines.data.public_set import TRAIN_ONLY
from pipelines.data.settings import Data
from pipelines.monitor.progress import say
from pipelines.tables.schemas import MANIFEST, SPLITS

FREE = -1  # a patient whom the source puts in no split
PLACES = 4096
NEVER_HELD_OUT = -2  # one of whom there are TRAIN_ONLY images alone


def empty(counts: dict[str, int]) -> list[str]:
    """The splits without images, of the counts of all."""
    return [name for name in SPLITS if not counts.get(name)]


def check_filled(counts: dict[str, int]) -> None:
    """Raise UserError where a split is empty: nothing can be learned, chosen or judged then."""
    if missing := empty(counts):
        raise UserError(f"ingest left no usable image for {' and '.join(missing)}; learning needs all of "
                         f"{', '.join(SPLITS)}: see ingest/quarantine for what was refused, and bring more patients")


def place(patient: str) -> int:
    """A stable place in [0, PLACES) for a patient, whatever other patients there are, and whatever the salt.

    It is so coarse that it does not tell who the patient is.
    """
    return int(hashlib.sha256(f"split\0{patient}".encode()).hexdigest()[:13], 16) * PLACES >> 52


def assign(manifest: pa.Table, settings: Data) -> pa.Table:
    """Fill `split`, of a table with `place` (schemas.PLACED), which is taken off; no patient is in two splits.

    A source's own split is kept. A patient whom it puts in several goes to the most held-out of them (test, then val).
    One of whom there are only TRAIN_ONLY images is not drawn into val or test.
    Where the source has no val (or no split), patients are taken by a stable hash of their identifier.

    Raises:
        UserError: fewer than three patients.
    """
    patients = manifest["patient_id"].combine_chunks().dictionary_encode()
    names, patient = patients.dictionary.to_pylist(), patients.indices.to_numpy()
    if len(names) < len(SPLITS):
        raise UserError(f"{manifest.num_rows} image(s) of {len(names)} patient(s) in {_where(settings)}: train, val "
                         "and test need one patient each at least")
    told = pc.fill_null(pc.index_in(manifest["split"], pa.array(SPLITS)), FREE).to_numpy()
    chosen, least = np.full(len(names), FREE), np.full(len(names), len(SPLITS))
    np.maximum.at(chosen, patient, told)
    np.minimum.at(least, patient, np.where(told == FREE, len(SPLITS), told))
    if torn := int((least < chosen).sum()):
        say(f"{torn} patients are in several of the source's splits; each goes to the most held-out one")
    only = np.ones(len(names), bool)
    np.logical_and.at(only, patient, pc.fill_null(pc.equal(manifest["split"], TRAIN_ONLY), False).to_numpy())
    chosen[only] = NEVER_HELD_OUT
    position = np.zeros(len(names))
    position[patient] = manifest["place"].to_numpy() / PLACES
    sources = manifest["source"].combine_chunks().dictionary_encode()
    home = np.zeros(len(names), np.int64)
    home[patient] = sources.indices.to_numpy()
    for source in range(len(sources.dictionary)):  # of a mix each set is split by itself
        part = np.flatnonzero(home == source)
        if len(SPLITS) > len(part) < len(names):
            continue
        official = bool((chosen[part] >= 0).any())
        for split, share in (("test", settings.test_fraction), ("val", settings.val_fraction)):
            chosen[part] = _hold_out(chosen[part], position[part], SPLITS.index(split), share, official=official)
    final = pa.array(SPLITS).take(pa.array(np.maximum(chosen, 0)[patient]))
    return manifest.set_column(manifest.schema.get_field_index("split"), "split", final).select(MANIFEST.names)


def _hold_out(chosen: np.ndarray, position: np.ndarray, split: int, share: float, *, official: bool) -> np.ndarray:
    """Give `split` its share of the patients that are free, at least one; nothing where the source filled it.

    One patient each stays for the splits still to be filled.

    Args:
        chosen: int (N,), the split of each patient of a source, or FREE, or NEVER_HELD_OUT.
        position: float (N,) in [0, 1).
        split: number of the split.
        share: of the patients.
        official: whether the source puts patients in splits; those of its train can be taken then.
    """
    train, val, test = range(len(SPLITS))
    if (chosen == split).any():
        return chosen
    free = np.flatnonzero((chosen == FREE) | (official & (chosen == train)))
    free = free[np.argsort(position[free], kind="stable")]
    start = 1 - share if split == val else 0.0  # val and test take different ends of [0, 1)
    taken = free[(start <= position[free]) & (position[free] < start + share)]
    others = 2 if split == test and not (chosen == val).any() else 1
    chosen = chosen.copy()
    chosen[(taken if len(taken) else free[:1])[: max(1, len(free) - others)]] = split
    return chosen


def _where(settings: Data) -> str:
    return f"data.root={settings.root!r}" if settings.root else f"data.source={settings.source}"
