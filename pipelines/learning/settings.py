"""Settings of every small network that is trained in one process."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.graph.fields import execution, positive


@dataclass
class SmallTrainingSettings:
    """How one small network is trained in one process; shared by the autoencoder, the encoder and the classifier."""

    images: int = 100_000
    """Training images seen, repeats counted."""
    max_epochs: int = 60
    """But no more passes than these over a small set."""
    batch: int = 32
    """Images in a training step."""
    lr: float = 1e-3
    """Peak learning rate, of a linear warm-up and a cosine."""
    weight_decay: float = 0.01
    """Of AdamW."""
    beta2: float = 0.99
    """Of Adam's second moment; 0.99 suits runs of a few thousand steps, 0.999 longer ones."""
    checkpoint_seconds: float = execution(60.0)
    """Between checkpoints."""

    def check_training(self, section: str) -> None:
        positive(section, self, "images", "max_epochs", "batch", "lr", "checkpoint_seconds")

    def training_images(self, n: int) -> int:
        """Training images seen when there are `n` to see."""
        return min(self.images, self.max_epochs * n)
