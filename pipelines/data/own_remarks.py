"""What a user should know of a list that was read: what may not be meant as it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.data.findings import FINDINGS, nearest
from pipelines.data.own_cells import STATES
from pipelines.data.own_table import OwnTable

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 8  # findings
MARKS = "[;,"  # of a cell that holds several findings


def remarks(own: OwnTable, listed: pa.Table) -> list[str]:
    """One line on each: rows that name an image again, a missing column of findings, findings of no vocabulary.

    Args:
        own: the table.
        listed: its rows as a manifest, with findings in canonical names.
    """
    from pipelines.graph.overrides import suggestion

    found, described = [], own.described
    if own.again:
        found.append(f"{own.again} rows name an image again; what the rows of one say is taken together")
    if not described.label_columns and not any(own.columns[state] for state in STATES):
        found.append("no column 'labels', nor another of findings: its images are unlabelled; "
                     f"{suggestion('labels', own.table.column_names)}")
    if unknown := _unknown(listed):
        shown = [f"{label!r}{f' ({close}?)' if (close := nearest(label)) else ''}" for label in unknown[:SHOWN]]
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        found.append(f"findings of its own, which no other set has: {', '.join(shown)}{more}; the key spellings of a "
                     "YAML file maps such words to those of the vocabulary")
    if mark := next((mark for mark in MARKS if any(mark in label for label in unknown)), None):
        found.append(f"a cell holds {mark!r}; if it joins findings, set separator ({described.separator!r} now)"
                     if mark != "[" else "a cell holds '[': join findings by the key separator, without brackets")
    return [f"{described.table}: {remark}" for remark in found]


def _unknown(listed: pa.Table) -> list[str]:
    """The findings that are not of the vocabulary, sorted."""
    import pyarrow.compute as pc

    return sorted({label for state in STATES for label in pc.unique(pc.list_flatten(listed[state])).to_pylist()}
                  - FINDINGS.keys())
