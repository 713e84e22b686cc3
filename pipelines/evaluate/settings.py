"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.graph.fields import positive


@dataclass
class EvaluateSettings:
    """The synthetic corpus against real images, each figure beside its real-to-real floor."""

    images: int = 500
    """Compared on each side, at most."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    pairs: int = 200
    """Random pairs of images for MS-SSIM."""

    def check(self) -> None:
        positive("evaluate", self, "images", "neighbours", "pairs")
