"""Progress of a stage: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cluster.storage import Folder
from pipelines.monitor.journal import JOURNAL, read_journal

if TYPE_CHECKING:
    from pipelines.monitor.loggers import MetricLogger

LINE_SECONDS = 10.0  # between plain lines without a terminal
BAR_METRICS = ("loss", "images_per_second", "mfu")


def say(text: str) -> None:
    """Print one line for the user, to stderr."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """Progress of one stage: a tqdm bar on a terminal, else a line every `LINE_SECONDS`."""

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        from tqdm import tqdm

        self.label, self.total, self.unit = label, total, unit
        self.n, self._start, self._said = 0, time.monotonic(), time.monotonic()
        self._first: int | None = None
        self._tqdm = tqdm(total=total, desc=label, unit=f" {unit}", smoothing=0.1) if sys.stderr.isatty() else None

    def to(self, n: int, **values: float) -> None:
        """Set progress to `n` of the total."""
        if self._first is None:
            self._first = n
        if self._tqdm is not None:
            self._tqdm.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self._tqdm.update(n - self.n)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            rate = values.get("images_per_second") or (n - self._first) / (self._said - self._start)
            left = f", {(self.total - n) / rate:.0f} s left" if rate > 0 else ""
            metrics = "".join(f", {k} {v:.4g}" for k, v in values.items())
            say(f"{self.label}: {n:,} of {self.total:,} {self.unit}{metrics}{left}")
        self.n = n

    def add(self, n: int) -> None:
        self.to(self.n + n)

    def close(self) -> None:
        if self._tqdm is not None:
            self._tqdm.close()


@contextlib.contextmanager
def bar(label: str, total: int, unit: str = "images") -> Iterator[Bar]:
    progress = Bar(label, total, unit)
    try:
        yield progress
    finally:
        progress.close()


@contextlib.contextmanager
def follow(folder: Folder, label: str, total: int, files: Sequence[str] = (JOURNAL,),
           loggers: Sequence[str] = ("tensorboard",), since: int = 0) -> Iterator[None]:
    """Show what other processes in the cluster log to the folder's journals, and forward it to the loggers.

    Entries of up to `since` images are skipped.
    """
    from pipelines.monitor.loggers import open_loggers

    writers = open_loggers(loggers, folder)
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(folder, label, total, dict.fromkeys(files, since), writers, stop),
                              daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for logger in writers:
            logger.close()


def _follow(folder: Folder, label: str, total: int, seen: dict[str, int], loggers: list[MetricLogger],
            stop: threading.Event) -> None:
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(f"{label}: {text}")

    with bar(label, total) as progress:
        while True:
            last = stop.wait(2.0 if folder.is_local else 15.0)
            try:
                for file in seen:
                    for entry in read_journal(folder, file):
                        images = entry.pop("images")
                        if images <= seen[file]:
                            continue
                        seen[file] = images
                        if warning := entry.pop("warning", None):
                            say_once(warning)
                        values = {k: v for k, v in entry.items() if k != "time"}
                        if file == JOURNAL:
                            progress.to(images, **{k: v for k, v in values.items() if k in BAR_METRICS})
                        for logger in loggers:
                            logger.log(images, values)
            except Exception as error:  # an unavailable storage or logger must not end training
                say_once(f"progress cannot be shown ({error})")
            if last:
                break
