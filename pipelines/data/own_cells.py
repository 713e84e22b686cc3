"""What the cells of a user's table say, and rows of one image joined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cluster.errors import SetMistake

STATES = ("labels", "absent", "uncertain")


EMPTY = ("", "nan", "NaN", "None")  # as data frames write a cell that is empty


def text(value: Any) -> str | None:
    """A cell without blanks around it; None where it is empty."""
    found = "" if value is None else str(value).strip()
    return None if found in EMPTY else found


def path(value: Any) -> str | None:
    """A path, also one that was written on Windows."""
    found = text(value)
    return found.replace("\\", "/") if found and "/" not in found else found


def identifier(value: Any) -> str | None:
    """A name or number, and a whole one as spreadsheets and data frames may write it (100.0) as 100."""
    found = text(value)
    return re.sub(r"^(\d+)\.0+$", r"\1", found) if found else None


def findings(value: Any, separator: str) -> list[str]:
    """The findings in a cell that is a list, or a text joined by `separator`."""
    parts = value.split(separator) if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [found for part in parts if (found := text(part))]


def joined(rows: Sequence[dict[str, Any]], table: str) -> dict[str, Any]:
    """One row of all that name an image: their findings and masks together; study and view where they agree.

    Args:
        rows: as `own_table.OwnTable` has them, of one key.
        table: for messages.

    Raises:
        SetMistake: they differ in the patient or the split.
    """
    if len(rows) == 1:
        return rows[0]
    agreed = {}
    for field in ("patient_id", "split", "study_id", "view"):
        values = list(dict.fromkeys(row[field] for row in rows if row[field] is not None))
        if len(values) > 1 and field in ("patient_id", "split"):
            raise SetMistake(f"{table}: the rows of {rows[0]['key']} have several values of {field}: "
                            f"{', '.join(values)}; give an image one in all its rows")
        agreed[field] = values[0] if len(values) == 1 else None
    lists = {field: [value for row in rows for value in row[field]] for field in (*STATES, "masks")}
    return {"key": rows[0]["key"], **agreed, **{
        field: [value for k, value in enumerate(values) if value not in values[:k]] for field, values in lists.items()}}
