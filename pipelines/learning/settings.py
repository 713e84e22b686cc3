"""Settings shared by the small networks that are trained in one process."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.graph.fields import execution, positive


@dataclass
class SmallTrainingSettings:
    """Training of one small network in one process; the base of the autoencoder, encoder and classifier settings."""

    images: int = 100_000
    """Training images seen, repeats counted."""
    max_epochs: int = 60
    """Upper limit on epochs, which ends training earlier on small sets."""
    batch: int = 32
    """Images per optimizer step."""
    lr: float = 1e-3
    """Peak learning rate; linear warm-up, then cosine decay."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    beta2: float = 0.99
    """Adam's beta2; 0.99 suits runs of a few thousand steps, 0.999 longer ones."""
    checkpoint_seconds: float = execution(60.0)
    """Seconds between checkpoints."""

    def check_training(self, section: str) -> None:
        positive(section, self, "images", "max_epochs", "batch", "lr", "checkpoint_seconds")

    def training_images(self, n: int) -> int:
        """Training images seen, repeats counted, on a set of `n` images."""
        return min(self.images, self.max_epochs * n)
