"""Settings of sampling."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from pipelines.graph.fields import execution, positive, require


@dataclass
class SampleSettings:
    """A synthetic corpus of one generator."""

    images: int = MISSING
    """In the corpus."""
    steps: int = 20
    """Of the sampler."""
    guidance: float = 2.0
    """Scale of classifier-free guidance; 1 is without."""
    strategy: str = "reconstruction"
    """How conditions are made from real images: reconstruction or interpolation of embeddings."""
    batch: int = 64
    """Images sampled at a time."""
    shard_rows: int = 256
    """Images in a file of the corpus."""
    actors: int | None = execution(None)
    """Ray actors that sample; null: one per GPU, or one on the CPUs."""

    def check(self) -> None:
        positive("sample", self, "images", "steps", "batch", "shard_rows", "actors")
        require(self.guidance >= 0, "sample.guidance", self.guidance, "must not be negative")
