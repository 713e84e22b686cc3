"""Peak memory of this process, and of this process and all below it: on one machine the driver and the Ray cluster."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

COUNTED = ("RssAnon", "RssShmem")  # fields of /proc/PID/status, in kB: counters, where smaps walks all page tables


class PeakMemory:
    """Sample the memory of the process tree every `interval` seconds while the block runs.

    Counted is what the kernel cannot drop when memory is short: anonymous pages, and shared memory (Ray's object store)
    once, as the process that has touched most of it has it; not pages of files (libraries, memory-mapped latents). On a
    cluster of several machines this is the memory of the driver's machine only.  `peak_mb` is of the process tree,
    `driver_mb` of this process.
    """

    def __init__(self, interval: float = 2.0) -> None:
        self.interval = interval
        self.peak_mb = self.driver_mb = 0.0
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
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._look()

    def _look(self) -> None:
        root = psutil.Process()
        self.driver_mb = max(self.driver_mb, round(process_mb(root), 1))
        self.peak_mb = max(self.peak_mb, round(tree_mb(root), 1))


def tree_mb(root: psutil.Process) -> float:
    """MiB held by a process and its descendants now."""
    anonymous, shared = zip(*map(_counted, [root, *root.children(recursive=True)]), strict=True)
    return sum(anonymous) + max(shared)


def process_mb(process: psutil.Process) -> float:
    """MiB held by one process, shared memory included, pages of files not; 0 for one that has ended."""
    return sum(_counted(process))


def _counted(process: psutil.Process) -> tuple[float, float]:
    """MiB of anonymous and of shared memory."""
    try:
        with open(f"/proc/{process.pid}/status", errors="replace") as file:
            sizes = dict(line.split(":", 1) for line in file)
    except OSError:
        return 0.0, 0.0
    anonymous, shared = (int(sizes.get(name, "0").split()[0]) / 1024 for name in COUNTED)  # a zombie has none
    return anonymous, shared
