"""Train, val and test by patient, before anything learns from the data."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from cluster.errors import UserError
from pipelines.data.public_set import TRAIN_ONLY
from pipelines.data.settings import Data
from pipelines.monitor.progress import say
from pipelines.tables.schemas import SPLITS


def empty(counts: dict[str, int]) -> list[str]:
    """The splits without images, of the counts of all."""
    return [name for name in SPLITS if not counts.get(name)]


def check_filled(counts: dict[str, int]) -> None:
    """Raise UserError where a split is empty: nothing can be learned, chosen or judged then."""
    if missing := empty(counts):
        raise UserError(f"ingest left no usable image for {' and '.join(missing)}; learning needs all of "
                         f"{', '.join(SPLITS)}: see ingest/quarantine for what was refused, and bring more patients")


def _position(patient: str) -> float:
    """A stable place in [0, 1) for a patient, whatever other patients there are."""
    return int(hashlib.sha256(f"split\0{patient}".encode()).hexdigest()[:13], 16) / 16**13


def assign(manifest: pa.Table, settings: Data) -> pa.Table:
    """Fill `split`; no patient is in two splits.

    A source's own split is kept. A patient whom it puts in several goes to the most held-out of them (test, then val).
    One of whom there are only TRAIN_ONLY images is not drawn into val or test.
    Where the source has no val (or no split), patients are taken by a stable hash of their identifier.

    Raises:
        UserError: fewer than three patients.
    """
    patients = manifest["patient_id"].to_pylist()
    given: dict[str, set[str | None]] = {}
    for patient, split in zip(patients, manifest["split"].to_pylist(), strict=True):
        given.setdefault(patient, set()).add(split)
    if len(given) < len(SPLITS):
        raise UserError(f"{manifest.num_rows} image(s) of {len(given)} patient(s) in {_where(settings)}: train, val "
                         "and test need one patient each at least")
    official = {patient: [split for split in SPLITS if split in splits] for patient, splits in given.items()}
    torn = [patient for patient, splits in official.items() if len(splits) > 1]
    if torn:
        say(f"{len(torn)} patients are in several of the source's splits; each goes to the most held-out one")
    chosen = {patient: splits[-1] if splits else TRAIN_ONLY if given[patient] == {TRAIN_ONLY} else None
              for patient, splits in official.items()}
    home = dict(zip(patients, manifest["source"].to_pylist(), strict=True))
    for source in dict.fromkeys(home.values()):  # of a mix each set is split by itself
        part = {patient: split for patient, split in chosen.items() if home[patient] == source}
        if len(part) < len(SPLITS) and len(part) < len(chosen):
            continue
        for split, share in (("test", settings.test_fraction), ("val", settings.val_fraction)):
            _hold_out(part, split, share, official=any(official[patient] for patient in part))
        chosen |= part
    final = {patient: split if split in SPLITS else "train" for patient, split in chosen.items()}
    splits = pa.array([final[patient] for patient in patients], pa.string())
    return manifest.set_column(manifest.schema.get_field_index("split"), "split", splits)


def _hold_out(chosen: dict[str, str | None], split: str, share: float, *, official: bool) -> None:
    """Give `split` its share of the patients that are free, at least one; nothing where the source filled it.

    One patient each stays for the splits still to be filled.
    """
    if split in chosen.values():
        return
    free = sorted((p for p, s in chosen.items() if s is None or (official and s == "train")), key=_position)
    start = 1 - share if split == "val" else 0.0  # val and test take different ends of [0, 1)
    taken = [p for p in free if start <= _position(p) < start + share] or free[:1]
    others = 2 if split == "test" and "val" not in chosen.values() else 1
    for patient in taken[: max(1, len(free) - others)]:
        chosen[patient] = split


def _where(settings: Data) -> str:
    return f"data.root={settings.root!r}" if settings.root else f"data.source={settings.source}"
