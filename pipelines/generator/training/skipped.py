"""Non-finite batches: skipped, counted, and recorded with their image ids in skipped.jsonl."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from cluster.storage import Folder
from pipelines.generator.latents.dataset import LatentBatch, LatentReader

FILE = "skipped.jsonl"


class SkippedBatches:
    """The same count on every worker; only the writer (rank 0) writes the file.

    Records of an earlier attempt beyond `cursor` images are dropped.
    """

    def __init__(self, folder: Folder, reader: LatentReader, cursor: int, is_writer: bool) -> None:
        self.folder, self.reader, self.is_writer = folder, reader, is_writer
        recorded = folder.read(FILE).decode().splitlines() if folder.exists(FILE) else []
        self._lines = [line for line in recorded if json.loads(line)["stop"] <= cursor]
        if len(self._lines) < len(recorded):
            self._write()
        self._pending: list[tuple[int, int]] = []
        self._flags: list[Tensor] = []

    def add(self, batch: LatentBatch, finite: Tensor) -> None:
        self._pending.append((batch.start, batch.stop))
        self._flags.append(finite)

    def flush(self) -> int:
        """Record the non-finite batches among those added since the last call; one host synchronisation.

        Returns:
            The total number of skipped batches.
        """
        finite = torch.stack(self._flags).tolist() if self._flags else []
        skipped = [span for span, ok in zip(self._pending, finite, strict=True) if not ok]
        self._pending, self._flags = [], []
        self._lines += [json.dumps({"start": start, "stop": stop, "image_ids": self.reader.ids(start, stop)})
                        for start, stop in skipped]
        if skipped:
            self._write()
        return len(self._lines)

    def _write(self) -> None:
        if self.is_writer:
            self.folder.write(FILE, "".join(line + "\n" for line in self._lines).encode())
