"""The denoiser's learning-rate schedule, over the images seen."""

from __future__ import annotations

import math

from pipelines.generator.training.settings import TrainerSettings
from pipelines.learning.schedule import warmup_cosine


def learning_rate(settings: TrainerSettings, seen: int) -> float:
    """Learning rate of the step that begins at `seen` images: linear warm-up, then `trainer.schedule`.

    inverse_sqrt is EDM2's (Karras et al. 2024): constant up to `decay_after_images`, then falling with the square root
    of the images seen.
    """
    if settings.schedule == "cosine":
        warmup = min(settings.warmup_images / settings.images, 1)
        return settings.lr * warmup_cosine(seen / settings.images, warmup, settings.final_lr_fraction)
    rate = settings.lr if seen >= settings.warmup_images else settings.lr * seen / settings.warmup_images
    if settings.schedule == "inverse_sqrt":
        rate /= math.sqrt(max(seen / settings.decay_after_images, 1))
    return rate
