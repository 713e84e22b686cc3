"""Splits into train, val and test by patient, before anything is trained."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from pipelines.data.public_set import TRAIN_ONLY
from pipelines.data.settings import DataSettings
from pipelines.monitor.progress import say
from pipelines.tables.schemas import MANIFEST, SPLITS

FREE = -1  # a patient without a split in the source
SPLIT_BUCKETS = 4096
NEVER_HELD_OUT = -2  # a patient with only TRAIN_ONLY images


def empty(counts: dict[str, int]) -> list[str]:
    """The splits without images."""
    return [name for name in SPLITS if not counts.get(name)]


def check_filled(counts: dict[str, int]) -> None:
    """Raise UserError if a split is empty: training, model selection and testing need all of them."""
    if missing := empty(counts):
        raise UserError(f"ingest left no usable image for {' and '.join(missing)}; training needs all of "
                        f"{', '.join(SPLITS)}: see ingest/quarantine for the rejected images, or add patients")


def split_bucket(patient: str) -> int:
    """A stable bucket in [0, SPLIT_BUCKETS) for a patient, independent of other patients and of the salt.

    It is too coarse to identify the patient.
    """
    return int(hashlib.sha256(f"split\0{patient}".encode()).hexdigest()[:13], 16) * SPLIT_BUCKETS >> 52


def assign(manifest: pa.Table, settings: DataSettings) -> pa.Table:
    """Fill `split` of a table with `bucket` (schemas.HASHED_MANIFEST), which is dropped; no patient is in two splits.

    A source's own split is kept. A patient in several of its splits goes to the most held-out of them (test, then val).
    Patients with only TRAIN_ONLY images are never held out. If the source has no val (or no split), patients are held
    out by a stable hash of their identifier.

    Raises:
        UserError: fewer than three patients.
    """
    patients = manifest["patient_id"].combine_chunks().dictionary_encode()
    names, patient = patients.dictionary.to_pylist(), patients.indices.to_numpy()
    if len(names) < len(SPLITS):
        raise UserError(f"{manifest.num_rows} image(s) of {len(names)} patient(s) in {_where(settings)}: train, val "
                        "and test need at least one patient each")
    official_split = pc.fill_null(pc.index_in(manifest["split"], pa.array(SPLITS)), FREE).to_numpy()
    chosen, least = np.full(len(names), FREE), np.full(len(names), len(SPLITS))
    np.maximum.at(chosen, patient, official_split)
    np.minimum.at(least, patient, np.where(official_split == FREE, len(SPLITS), official_split))
    if torn := int((least < chosen).sum()):
        say(f"{torn} patients are in several of the source's splits; each goes to the most held-out one")
    only = np.ones(len(names), bool)
    np.logical_and.at(only, patient, pc.fill_null(pc.equal(manifest["split"], TRAIN_ONLY), False).to_numpy())
    chosen[only] = NEVER_HELD_OUT
    position = np.zeros(len(names))
    position[patient] = manifest["bucket"].to_numpy() / SPLIT_BUCKETS
    sources = manifest["source"].combine_chunks().dictionary_encode()
    home = np.zeros(len(names), np.int64)
    home[patient] = sources.indices.to_numpy()
    for source in range(len(sources.dictionary)):  # each set of a mix is split separately
        part = np.flatnonzero(home == source)
        if len(SPLITS) > len(part) < len(names):
            continue
        official = bool((chosen[part] >= 0).any())
        for split, share in (("test", settings.test_fraction), ("val", settings.val_fraction)):
            chosen[part] = _hold_out(chosen[part], position[part], SPLITS.index(split), share, official=official)
    final = pa.array(SPLITS).take(pa.array(np.maximum(chosen, 0)[patient]))
    return manifest.set_column(manifest.schema.get_field_index("split"), "split", final).select(MANIFEST.names)


def _hold_out(chosen: np.ndarray, position: np.ndarray, split: int, share: float, *, official: bool) -> np.ndarray:
    """Assign free patients to `split`, at least one; none if the source filled it.

    One patient each is left for the splits that are still empty.

    Args:
        chosen: int (N,), the split of each patient of a source, FREE, or NEVER_HELD_OUT.
        position: float (N,) in [0, 1).
        split: number of the split.
        share: of the patients.
        official: whether the source has splits; then patients of its train split can be held out.
    """
    train, val, test = range(len(SPLITS))
    if (chosen == split).any():
        return chosen
    free = np.flatnonzero((chosen == FREE) | (official & (chosen == train)))
    free = free[np.argsort(position[free], kind="stable")]
    start = 1 - share if split == val else 0.0  # val and test use opposite ends of [0, 1)
    taken = free[(start <= position[free]) & (position[free] < start + share)]
    others = 2 if split == test and not (chosen == val).any() else 1
    chosen = chosen.copy()
    chosen[(taken if len(taken) else free[:1])[: max(1, len(free) - others)]] = split
    return chosen


def _where(settings: DataSettings) -> str:
    return f"data.root={settings.root!r}" if settings.root else f"data.source={settings.source}"
