"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.graph.fields import positive


@dataclass
class EvaluateSettings:
    """Comparison of the synthetic corpus with real images, with a real-to-real floor for each metric."""

    images: int = 500
    """Maximum number of synthetic and of real images that are compared."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    pairs: int = 200
    """Random pairs of images for MS-SSIM."""

    def check(self) -> None:
        positive("evaluate", self, "images", "neighbours", "pairs")
