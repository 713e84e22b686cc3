"""Batches whose loss was no finite number: skipped, counted, and written down with the ids of their images."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from cluster.storage import Folder
from pipelines.generator.latents.dataset import Batch, Reader

FILE = "skipped.jsonl"


class Skipped:
    """All workers hold one and come to the same count; rank 0 alone writes.

    Entries beyond `cursor` images are of an attempt that did not last, and are dropped.
    """

    def __init__(self, folder: Folder, reader: Reader, cursor: int, writes: bool) -> None:
        self.folder, self.reader, self.writes = folder, reader, writes
        found = folder.read(FILE).decode().splitlines() if folder.exists(FILE) else []
        self._lines = [line for line in found if json.loads(line)["stop"] <= cursor]
        if len(self._lines) < len(found):
            self._write()
        self._open: list[tuple[int, int]] = []
        self._flags: list[Tensor] = []

    def add(self, batch: Batch, finite: Tensor) -> None:
        self._open.append((batch.start, batch.stop))
        self._flags.append(finite)

    def settle(self) -> int:
        """Look at the batches added since the last call (the device is waited for once).

        Returns:
            The number of skipped batches in all.
        """
        finite = torch.stack(self._flags).tolist() if self._flags else []
        bad = [span for span, good in zip(self._open, finite, strict=True) if not good]
        self._open, self._flags = [], []
        self._lines += [json.dumps({"start": start, "stop": stop, "image_ids": self.reader.ids(start, stop)})
                        for start, stop in bad]
        if bad:
            self._write()
        return len(self._lines)

    def _write(self) -> None:
        if self.writes:
            self.folder.write(FILE, "".join(line + "\n" for line in self._lines).encode())
