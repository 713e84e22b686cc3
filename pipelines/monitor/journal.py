"""metrics.jsonl: a stage's log, one JSON object per interval."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from cluster.storage import Folder

JOURNAL = "metrics.jsonl"


class Journal:
    """Writes metrics.jsonl of a stage: one JSON object per interval, in order of the images seen.

    A run that resumes at `images` drops later entries of an earlier attempt, so that no interval appears twice.
    """

    def __init__(self, folder: Folder, images: int = 0) -> None:
        self.folder = folder
        self._start, self._since = time.perf_counter(), images
        kept = [entry for entry in read_journal(folder) if entry["images"] <= images]
        self._lines = [json.dumps(entry) + "\n" for entry in kept]
        self.folder.write(JOURNAL, "".join(self._lines).encode())

    def log(self, images: int, **values: float | str) -> None:
        """Record `values` (and images/s since the last record) at `images` images seen."""
        now = time.perf_counter()
        rate = (images - self._since) / max(now - self._start, 1e-9)
        self._start, self._since = now, images
        entry = {"images": images, "images_per_second": round(rate, 2), "time": round(time.time(), 2), **values}
        line = json.dumps(entry) + "\n"
        if self.folder.is_local:
            with open(f"{self.folder.uri}/{JOURNAL}", "a") as file:
                file.write(line)
        else:
            self._lines.append(line)
            with contextlib.suppress(OSError):  # the next entry writes all lines again
                self.folder.write(JOURNAL, "".join(self._lines).encode())


def read_journal(folder: Folder, file: str = JOURNAL) -> list[dict[str, Any]]:
    """All complete entries of a stage's journal; empty if there is none."""
    try:
        lines = folder.read(file).decode().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def median_rate(entries: Sequence[dict[str, Any]]) -> float | None:
    """Median images/s of journal entries; None without entries."""
    rates = sorted(entry["images_per_second"] for entry in entries)
    return rates[len(rates) // 2] if rates else None
