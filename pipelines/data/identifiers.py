"""Patients' and studies' identifiers as salted hashes, which tell nobody without the salt.

A record number has so few digits that under a known salt all of them are hashed in minutes. The salt is RAYOGRAPH_SALT
or a random one that is made once for each storage, so that all runs in it agree on who is who. It lies at the top of
the storage, outside every run, and so in nothing that a run exports or publishes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data.duplicates import joined
from pipelines.data.split import place
from pipelines.monitor.progress import say

VARIABLE = "RAYOGRAPH_SALT"
FILE = ".rayograph-salt"  # of a storage; readable by its owner only, where it is a disk's
RANDOM_BYTES = 32
HIDDEN = ("patient_id", "study_id", "alias")


@dataclass(frozen=True)
class Salt:
    """A secret that no message shows."""

    secret: str = field(repr=False)

    def hashed(self, identifier: str) -> str:
        """64 bits in hexadecimal: among 10 million patients two share one with a chance of 3 in a million."""
        return self._digest(identifier)[:16]

    def check(self) -> str:
        """Tells one salt from another, and too short to guess a salt by."""
        return self._digest("which salt is this?")[:4]

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.secret}\0{text}".encode()).hexdigest()


def salt_of(storage: Folder) -> Salt:
    """The salt of all runs in a storage, made and kept there where the environment gives none.

    Of several processes that make one at once the first one's stays, and all of them return it.

    Raises:
        UserError: the file of the salt is damaged.
    """
    if given := os.environ.get(VARIABLE):
        return Salt(given)
    if not storage.exists(FILE):
        storage.write(FILE, secrets.token_hex(RANDOM_BYTES).encode(), replace=False, private=True)
        say(f"identifiers are hashed with the secret in {storage.uri}/{FILE}: keep it as safe as the data; {VARIABLE} "
            "takes one of your own")
    secret = storage.read(FILE).decode(errors="replace")
    if len(secret) != 2 * RANDOM_BYTES:
        raise UserError(f"{storage.uri}/{FILE} is damaged; put back a copy of it, or remove it to have new identifiers")
    return Salt(secret)


def which_salt() -> str:
    """Of the fingerprint: a check of the environment's salt; a storage's own never changes."""
    given = os.environ.get(VARIABLE)
    return Salt(given).check() if given else "of the storage"


def hide(manifest: pa.Table, salt: Salt) -> pa.Table:
    """The rows with HIDDEN hashed and the patient's `place` taken before ; what is null stays null."""
    patients = manifest["patient_id"].combine_chunks().dictionary_encode()
    places = pa.array([place(patient) for patient in patients.dictionary.to_pylist()], pa.int16())
    manifest = manifest.append_column("place", places.take(patients.indices))
    for name in (name for name in HIDDEN if name in manifest.column_names):
        values = manifest[name].combine_chunks().dictionary_encode()
        hashed = pa.array([value and salt.hashed(value) for value in values.dictionary.to_pylist()], pa.string())
        manifest = manifest.set_column(manifest.schema.get_field_index(name), name, hashed.take(values.indices))
    return manifest


def hide_row(row: dict[str, Any], salt: Salt) -> dict[str, Any]:
    """`hide` of one row."""
    return row | {"place": place(row["patient_id"])} | {
        name: salt.hashed(row[name]) if row.get(name) else None for name in HIDDEN}


def unite(manifest: pa.Table) -> pa.Table:
    """The rows (schemas.PLACED) with one `patient_id` and `place` for a patient who is known by two identifiers.

    An alias counts where it is the `patient_id` of another row. Of the identifiers that are one person's, that of the
    lowest place is taken, so that the split does not depend on the salt.
    """
    patients = manifest["patient_id"].combine_chunks().dictionary_encode()
    patient = patients.indices.to_numpy()
    alias = pc.index_in(manifest["alias"], patients.dictionary)
    linked = alias.is_valid().to_numpy()
    if not linked.any():
        return manifest
    n = len(patients.dictionary)
    person = joined(np.arange(n), (patient[linked], alias.drop_null().to_numpy()))
    places = np.zeros(n, np.int16)
    places[patient] = manifest["place"].to_numpy()
    lowest_first = np.lexsort((places, person))
    _, heads = np.unique(person[lowest_first], return_index=True)
    chosen = lowest_first[heads][person]  # the identifier in place of each
    if several := n - len(heads):
        say(f"{several} patients have another identifier in the list than in a header; each counts as one person")
    for name, values in (("patient_id", patients.dictionary.take(pa.array(chosen[patient]))),
                         ("place", pa.array(places[chosen][patient]))):
        manifest = manifest.set_column(manifest.schema.get_field_index(name), name, values)
    return manifest
