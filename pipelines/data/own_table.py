"""The table of a user's own set, and what its rows say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cluster.errors import SetMistake
from pipelines.data.files import BATCH
from pipelines.data.findings import FINDINGS, NO_FINDING, NO_PATHOLOGY, canonical, spelling_key
from pipelines.data.own_cells import STATES, findings, identifier, joined, path, text
from pipelines.data.own_file import read_table
from pipelines.data.own_set import DEFAULTS, OwnSet, within

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
               "testing": "test"}


class OwnTable:
    """The table of a set, read row by row.

    Args:
        described: the set.

    Raises:
        SetMistake: it is no table, or a column that is named is not there.
        UserError: it cannot be read.
    """

    def __init__(self, described: OwnSet) -> None:
        self.described, self.table = described, read_table(described.table)
        self.names = set(self.table.column_names)
        key = described.key or next((name for name in ("uri", "path") if name in self.names), None)
        if key is None:
            raise SetMistake(f"{described.table} has no column 'path' or 'uri'; it has "
                            f"{', '.join(self.table.column_names)}")
        self.key = self._named(key)
        self.columns = {field: self._column(field) for field in ("patient", "study", "view", "split", *STATES)}
        self.masks = {structure: column for structure, column in described.masks.items()
                      if column in self.names or (described.masks != OwnSet(table="").masks and self._named(column))}
        self.states = {cell.casefold(): state for state, cells in zip(STATES, (
            described.present_values, described.absent_values, described.uncertain_values), strict=True)
            for cell in cells}
        for column in described.label_columns:
            self._named(column)
        self._spelled = {spelling_key(word): finding for word, finding in described.spellings.items()}
        self._image = self._numbers()
        self.again = int((self._image >= 0).sum()) - len(np.unique(self._image[self._image >= 0]))

    @property
    def exhaustive(self) -> bool:
        """Whether a row that has labels was read for all labels of the table."""
        return not self.described.label_columns and not self.columns["absent"]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per image, in the order of first mention: `key`, and fields of the manifest; findings as spelled.

        Several rows of one image are joined; `again` counts those beyond the first.

        Raises:
            SetMistake: a cell holds what is none of the values that are known, or rows of one image contradict.
        """
        order = np.argsort(self._image, kind="stable")
        order = order[(self._image < 0).sum() :]
        cells = (row for batch in self.table.take(order).to_batches(BATCH) for row in batch.to_pylist())
        for _, rows in itertools.groupby(zip(self._image[order], cells, strict=True), lambda row: row[0]):
            yield joined([self._row(row) for _, row in rows], self.described.table)

    def _numbers(self) -> np.ndarray:
        """Of each row the number of the image that it names, -1 where it names none, int (N,)."""
        import pyarrow as pa

        base = self.described.folder()
        keys = [self._key(cell) for cell in self.table[self.key].to_pylist()]
        if self.described.key_is == "path":
            keys = [key and within(base, key) for key in keys]
        return pa.array(keys, pa.string()).dictionary_encode().indices.fill_null(-1).to_numpy()

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        cells = {field: row[column] for field, column in self.columns.items() if column}
        return {
            "key": self._key(row[self.key]), "patient_id": identifier(cells.get("patient")),
            "study_id": identifier(cells.get("study")), "view": text(cells.get("view")),
            "split": self._split(cells, row), **self._findings(cells, row),
            "masks": [{"name": structure, "path": where, "rle": None}
                      for structure, column in self.masks.items() if (where := path(row[column]))],
        }

    def _key(self, cell: Any) -> str | None:
        return path(cell) if self.described.key_is == "path" else identifier(cell)

    def _split(self, cells: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
        value = identifier(cells.get("split")) or ""
        known = self.described.splits or SPLIT_NAMES
        split = known.get(value) or known.get(value.lower())
        if value and split is None:
            raise SetMistake(f"{row[self.key]}: split {value!r} is none of {', '.join(known)}")
        return split

    def _findings(self, cells: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, list[str]]:
        if not self.described.label_columns:
            return {state: [self._spelling(label) for label in findings(cells.get(state), self.described.separator)]
                    for state in STATES}
        found: dict[str, list[str]] = {state: [] for state in STATES}
        blank = []
        for column in self.described.label_columns:
            cell, finding = str(row[column]).strip().casefold(), self._spelling(column)
            if cell in self.states:
                found[self.states[cell]].append(finding)
            elif text(row[column]) is None:
                blank.append(finding)
            else:
                raise SetMistake(f"{self.described.table}, {row[self.key]}: {column} is {row[column]!r}, which none of "
                                 "present_values, absent_values and uncertain_values holds")
        if any(NO_FINDING in canonical(finding, "manifest") for finding in found["labels"]):
            found["absent"] += [finding for finding in blank
                                if set(canonical(finding, "manifest")) <= FINDINGS.keys() - NO_PATHOLOGY]
        return found

    def _spelling(self, label: str) -> str:
        return self._spelled.get(spelling_key(label), label)

    def _column(self, field: str) -> str | None:
        """The column of a field; None where it has its usual name and is not there."""
        column = getattr(self.described, field)
        return column if column in self.names or (column != DEFAULTS[field] and self._named(column)) else None

    def _named(self, column: str) -> str:
        if column not in self.names:
            raise SetMistake(f"{self.described.table} has no column {column!r}; it has "
                            f"{', '.join(self.table.column_names)}")
        return column
