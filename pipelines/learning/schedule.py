"""Learning-rate schedules."""

from __future__ import annotations

import math


def warmup_cosine(progress: float, warmup: float, final: float) -> float:
    """Learning-rate factor at `progress` of the run, both in [0, 1]: linear warm-up, then cosine to `final`."""
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9))) / 2
