"""Settings of what is trained on corpora."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.graph.fields import positive, require
from pipelines.learning.settings import SmallTrainingSettings


@dataclass
class FinetuneSettings(SmallTrainingSettings):
    """Classifiers from real images, from synthetic ones, and from both, judged on real images."""

    target: str | None = None
    """The finding to learn, in any of its spellings; chosen from the labels when null."""
    backbone: Literal["scratch", "encoder"] = "scratch"
    """scratch: a small ResNet on images; encoder: a head on the embeddings of the run's frozen encoder."""
    channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    """Of the ResNet, one entry a level."""
    eval_images: int = 10_000
    """At most so many images of the val and of the test split are scored; a sample stratified by source where there
    are more."""

    def check(self) -> None:
        self.check_training("finetune")
        positive("finetune", self, "eval_images")
        require(len(self.channels) > 0 and min(self.channels) > 0, "finetune.channels", self.channels,
                "needs a width above 0 for every level")
