"""Learning-rate schedules over the images seen."""

from __future__ import annotations

import math

from pipelines.generator.settings import TrainerSettings


def warmup_cosine(progress: float, warmup: float, final: float) -> float:
    """Learning-rate factor at `progress` of the run, both in [0, 1]: linear warm-up, then cosine to `final`."""
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9))) / 2


def learning_rate(settings: TrainerSettings, seen: int) -> float:
    """Of the step that begins at `seen` images: linear warm-up, then the schedule of the settings.

    inverse_sqrt is EDM2's: constant up to `decay_after_images`, then falling with the root of the images seen.
    """
    if settings.schedule == "cosine":
        warmup = min(settings.warmup_images / settings.images, 1)
        return settings.lr * warmup_cosine(seen / settings.images, warmup, settings.final_lr_fraction)
    rate = settings.lr if seen >= settings.warmup_images else settings.lr * seen / settings.warmup_images
    if settings.schedule == "inverse_sqrt":
        rate /= math.sqrt(max(seen / settings.decay_after_images, 1))
    return rate
