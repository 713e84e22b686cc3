"""Settings of models trained on corpora."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.graph.fields import positive, require
from pipelines.learning.settings import SmallTrainingSettings


@dataclass
class FinetuneSettings(SmallTrainingSettings):
    """Classifiers trained on real images, on synthetic images, and on both, all evaluated on real test images."""

    target: str | None = None
    """Finding to classify, in any spelling; null: chosen from the labels."""
    backbone: Literal["scratch", "encoder"] = "scratch"
    """scratch: a small ResNet on images; encoder: a head on embeddings of the run's frozen encoder."""
    channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    """ResNet: feature channels of each level."""
    eval_images: int = 10_000
    """Maximum number of images of the val and of the test split that are scored; larger splits are sampled,
    stratified by source."""

    def check(self) -> None:
        self.check_training("finetune")
        positive("finetune", self, "eval_images")
        require(len(self.channels) > 0 and min(self.channels) > 0, "finetune.channels", self.channels,
                "needs a width above 0 for every level")
