"""Settings of sampling."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from pipelines.graph.fields import execution, positive, require


@dataclass
class SampleSettings:
    """Sampling of a synthetic corpus from a generator."""

    images: int = MISSING
    """Images in the corpus."""
    steps: int = 20
    """Sampling steps."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 disables guidance. Above 1, samples are more typical of their condition, and
    further from the distribution of real images."""
    strategy: str = "reconstruction"
    """How the condition of an image is made from real images: reconstruction (one embedding) or interpolation
    (between two)."""
    batch: int = 64
    """Images per forward pass."""
    shard_rows: int = 256
    """Images per file of the corpus."""
    actors: int | None = execution(None)
    """Ray actors that sample; null: one per GPU, or one per CPU as far as the memory goes."""

    def check(self) -> None:
        positive("sample", self, "images", "steps", "batch", "shard_rows", "actors")
        require(self.guidance >= 0, "sample.guidance", self.guidance, "must not be negative")
