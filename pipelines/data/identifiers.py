"""Pseudonymisation: patient and study identifiers as salted hashes.

Record numbers have so few digits that with a known salt all of them can be hashed in minutes. The salt is
RAYOGRAPH_SALT or a random one, created once per storage so that all runs in it map a patient to the same hash. It is
kept at the top of the storage, outside every run, and so is never exported or published.
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
from pipelines.data.duplicates import merged_groups
from pipelines.data.split import split_bucket
from pipelines.monitor.progress import say

VARIABLE = "RAYOGRAPH_SALT"
FILE = ".rayograph-salt"  # in the storage; on a disk readable by its owner only
RANDOM_BYTES = 32
IDENTIFIERS = ("patient_id", "study_id", "alias")


@dataclass(frozen=True)
class Salt:
    """A secret that is never shown in messages."""

    secret: str = field(repr=False)

    def hash(self, identifier: str) -> str:
        """64 bits in hexadecimal; among 10 million patients the probability of a collision is 3 in a million."""
        return self._digest(identifier)[:16]

    def fingerprint(self) -> str:
        """Distinguishes salts, and is too short to guess one from."""
        return self._digest("which salt is this?")[:4]

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.secret}\0{text}".encode()).hexdigest()


def salt_of(storage: Folder) -> Salt:
    """The salt of all runs in a storage, created there if the environment sets none.

    If several processes create one at once, the first wins and all of them return it.

    Raises:
        UserError: the file of the salt is damaged.
    """
    if given := os.environ.get(VARIABLE):
        return Salt(given)
    if not storage.exists(FILE):
        storage.write(FILE, secrets.token_hex(RANDOM_BYTES).encode(), replace=False, private=True)
        say(f"identifiers are hashed with the secret in {storage.uri}/{FILE}: keep it as safe as the data; {VARIABLE} "
            "overrides it")
    secret = storage.read(FILE).decode(errors="replace")
    if len(secret) != 2 * RANDOM_BYTES:
        raise UserError(f"{storage.uri}/{FILE} is damaged; restore a copy of it, or remove it to get new identifiers")
    return Salt(secret)


def salt_fingerprint() -> str:
    """Part of ingest's fingerprint: identifies the salt of the environment; that of a storage never changes."""
    given = os.environ.get(VARIABLE)
    return Salt(given).fingerprint() if given else "of the storage"


def pseudonymise(manifest: pa.Table, salt: Salt) -> pa.Table:
    """The rows with HIDDEN hashed and the patient's split `bucket` added; nulls stay null."""
    patients = manifest["patient_id"].combine_chunks().dictionary_encode()
    buckets = pa.array([split_bucket(patient) for patient in patients.dictionary.to_pylist()], pa.int16())
    manifest = manifest.append_column("bucket", buckets.take(patients.indices))
    for name in (name for name in IDENTIFIERS if name in manifest.column_names):
        values = manifest[name].combine_chunks().dictionary_encode()
        hashed = pa.array([value and salt.hash(value) for value in values.dictionary.to_pylist()], pa.string())
        manifest = manifest.set_column(manifest.schema.get_field_index(name), name, hashed.take(values.indices))
    return manifest


def pseudonymise_row(row: dict[str, Any], salt: Salt) -> dict[str, Any]:
    """`pseudonymise` for one row."""
    hashes = {name: salt.hash(row[name]) if row.get(name) else None for name in IDENTIFIERS}
    return row | hashes | {"bucket": split_bucket(row["patient_id"])}


def unite(manifest: pa.Table) -> pa.Table:
    """The rows (schemas.HASHED_MANIFEST) with one `patient_id` and `bucket` per patient known by two identifiers.

    An alias counts if it is the `patient_id` of another row. Of a person's identifiers the one with the lowest bucket
    is kept, so that the split does not depend on the salt.
    """
    patients = manifest["patient_id"].combine_chunks().dictionary_encode()
    patient = patients.indices.to_numpy()
    alias = pc.index_in(manifest["alias"], patients.dictionary)
    linked = alias.is_valid().to_numpy()
    if not linked.any():
        return manifest
    n = len(patients.dictionary)
    person = merged_groups(np.arange(n), (patient[linked], alias.drop_null().to_numpy()))
    buckets = np.zeros(n, np.int16)
    buckets[patient] = manifest["bucket"].to_numpy()
    lowest_first = np.lexsort((buckets, person))
    _, heads = np.unique(person[lowest_first], return_index=True)
    chosen = lowest_first[heads][person]  # the identifier that replaces each
    if several := n - len(heads):
        say(f"{several} patients have another identifier in the list than in a header; each counts as one person")
    for name, values in (("patient_id", patients.dictionary.take(pa.array(chosen[patient]))),
                         ("bucket", pa.array(buckets[chosen][patient]))):
        manifest = manifest.set_column(manifest.schema.get_field_index(name), name, values)
    return manifest
