"""What a stage shows while it works (a bar on a terminal, plain lines elsewhere) and the record it keeps."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cluster.storage import Folder

if TYPE_CHECKING:
    from pipelines.boards import Board

LINE_SECONDS = 10.0  # between plain lines where there is no terminal
JOURNAL = "metrics.jsonl"
SHOWN = ("loss", "images_per_second", "mfu")


def say(text: str) -> None:
    """One line for the user."""
    print(text, file=sys.stderr, flush=True)


class Journal:
    """metrics.jsonl of a stage: one JSON object per interval, in order of the images seen.

    A run that resumes at `images` drops what an earlier attempt wrote past that point, so no interval appears twice.
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
            with contextlib.suppress(OSError):  # the next one writes it, too
                self.folder.write(JOURNAL, "".join(self._lines).encode())


def read_journal(folder: Folder, file: str = JOURNAL) -> list[dict[str, Any]]:
    """All whole entries of a journal of a stage; empty when there is none."""
    try:
        lines = folder.read(file).decode().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Bar:
    """Progress of one stage: a tqdm bar on a terminal, else a line every `LINE_SECONDS`."""

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        from tqdm import tqdm

        self.label, self.total, self.unit = label, total, unit
        self.n, self._start, self._said = 0, time.monotonic(), time.monotonic()
        self._first: int | None = None
        self._tqdm = tqdm(total=total, desc=label, unit=f" {unit}", smoothing=0.1) if sys.stderr.isatty() else None

    def to(self, n: int, **values: float) -> None:
        """Show that `n` of the total are done."""
        if self._first is None:
            self._first = n
        if self._tqdm is not None:
            self._tqdm.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self._tqdm.update(n - self.n)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            rate = values.get("images_per_second") or (n - self._first) / (self._said - self._start)
            left = f", {(self.total - n) / rate:.0f} s left" if rate > 0 else ""
            shown = "".join(f", {k} {v:.4g}" for k, v in values.items())
            say(f"{self.label}: {n:,} of {self.total:,} {self.unit}{shown}{left}")
        self.n = n

    def add(self, n: int) -> None:
        self.to(self.n + n)

    def close(self) -> None:
        if self._tqdm is not None:
            self._tqdm.close()


@contextlib.contextmanager
def bar(label: str, total: int, unit: str = "images") -> Iterator[Bar]:
    shown = Bar(label, total, unit)
    try:
        yield shown
    finally:
        shown.close()


@contextlib.contextmanager
def follow(folder: Folder, label: str, total: int, files: Sequence[str] = (JOURNAL,),
           boards: Sequence[str] = ("tensorboard",), since: int = 0) -> Iterator[None]:
    """Show, and pass on to the boards, what processes elsewhere in the cluster log to the folder's journals.

    Entries of up to `since` images were shown before.
    """
    from pipelines.boards import open_boards

    opened = open_boards(boards, folder)
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(folder, label, total, dict.fromkeys(files, since), opened, stop),
                              daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for board in opened:
            board.close()


def _follow(folder: Folder, label: str, total: int, seen: dict[str, int], boards: list[Board],
            stop: threading.Event) -> None:
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(f"{label}: {text}")

    with bar(label, total) as shown:
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
                            shown.to(images, **{k: v for k, v in values.items() if k in SHOWN})
                        for board in boards:
                            board.log(images, values)
            except Exception as error:  # a store or a board that is not there for now does not end the training
                say_once(f"its progress cannot be shown ({error})")
            if last:
                break
