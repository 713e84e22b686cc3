"""Peak memory of this process and all below it, which on one machine is the driver and the whole Ray cluster."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Sample the proportional set size of the process tree every `interval` seconds while the block runs.

    Pages shared between processes (libraries, Ray's object store) count once. On a cluster of several machines this is
    the memory of the driver's machine only.
    """

    def __init__(self, interval: float = 2.0) -> None:
        self.interval = interval
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_mb = round(max(self.peak_mb, tree_mb()), 1)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak_mb = max(self.peak_mb, tree_mb())


def tree_mb() -> float:
    """MiB held by this process and its descendants now."""
    root = psutil.Process()
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20
