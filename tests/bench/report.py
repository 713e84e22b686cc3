"""One JSON line a figure, each a ratio against a named baseline measured in the same run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def emit(bench: str, ratio: float, goal: float, **figures: Any) -> None:
    """Print one figure; `goal` is the least ratio that is good enough."""
    print(json.dumps({"bench": bench, "ratio": round(ratio, 3), "goal": goal, "met": ratio >= goal, **figures}),
          flush=True)


class Clock:
    """Notes when which number of images is done, in the place of a progress bar."""

    def __init__(self) -> None:
        self.n, self.seen = 0, []

    def add(self, rows: int) -> None:
        self.n += rows
        self.seen.append((time.perf_counter(), self.n))

    def steady(self) -> float:
        """Images/s while every core is at work: from the second finished shard to the last but one."""
        (start, before), (stop, after) = self.seen[1], self.seen[-2]
        return (after - before) / (stop - start)


def alternate(ours: Callable[[], int], baseline: Callable[[], int], rounds: int) -> tuple[float, float, float]:
    """Median of the ratios of neighbouring runs, and median images/s of both.

    The two run in turn, after one warm-up round each, so that the machine's drift meets them alike.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for kept, run in zip(rates, (ours, baseline), strict=True):
            start = time.perf_counter()
            images = run()
            if turn:
                kept.append(images / (time.perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
    return ratio, statistics.median(rates[0]), statistics.median(rates[1])
