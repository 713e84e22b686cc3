"""DINO (Caron et al. 2021, arXiv 2104.14294) with two components of DINOv2 (Oquab et al. 2023, arXiv 2304.07193) that
prevent collapse on small sets: Sinkhorn-Knopp centring and the KoLeo regulariser. Views are not mirrored: the heart is
on the left."""

from __future__ import annotations

import copy

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.generator.encoder.vit import whole_patches
from pipelines.generator.settings import EncoderSettings
from pipelines.generator.standalone.image_encoder import Encoder

STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.05
SINKHORN_ITERATIONS = 3


class Head(nn.Module):
    """DINO's projection: MLP, unit-norm bottleneck, unit-norm prototypes."""

    def __init__(self, width: int, prototypes: int, hidden: int = 256, bottleneck: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) to cosine logits (B, prototypes)."""
        return F.linear(F.normalize(self.mlp(features), dim=-1), F.normalize(self.prototypes, dim=-1))


class Network(nn.Module):
    def __init__(self, encoder: Encoder, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head


class Dino(nn.Module):
    """Student and teacher; the teacher is the student's EMA and becomes the encoder."""

    def __init__(self, encoder: Encoder, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        size = encoder.image_size
        self.student = Network(encoder, Head(encoder.embedding_dim, settings.prototypes))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        local = whole_patches(size // 2, encoder.vit)
        self.global_view, self.local_view = views(size, (0.4, 1.0)), views(local, (0.1, 0.4))

    def loss(self, images: Tensor, progress: float) -> dict[str, Tensor]:
        """Cross-entropy between teacher and student over views of (B, 1, H, W) floats in [0, 1], plus KoLeo."""
        momentum = 1 - (1 - self.settings.teacher_momentum) * (1 + np.cos(np.pi * progress)) / 2
        with torch.no_grad():
            for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(value, 1 - momentum)
            global_views = [self.global_view(images) for _ in range(2)]
            local_views = [self.local_view(images) for _ in range(self.settings.local_crops)]
            targets = [sinkhorn(logits) for logits in
                       self.teacher.head(self.teacher.encoder(torch.cat(global_views))).float().chunk(2)]
        features = self.student.encoder(torch.cat(global_views))
        students = list(self.student.head(features).chunk(2))
        if local_views:
            local = self.student.head(self.student.encoder(torch.cat(local_views), resize=False))
            students += list(local.chunk(len(local_views)))
        terms = [-(target * F.log_softmax(student.float() / STUDENT_TEMPERATURE, dim=-1)).sum(-1).mean()
                 for t, target in enumerate(targets) for s, student in enumerate(students) if s != t]
        dino = torch.stack(terms).mean()
        spread = torch.stack([koleo(half.float()) for half in features.chunk(2)]).mean()
        return {"loss": dino + self.settings.koleo_weight * spread, "dino": dino.detach(), "koleo": spread.detach()}


@torch.no_grad()
def sinkhorn(logits: Tensor) -> Tensor:
    """Soft assignments (B, K) that use all prototypes equally (Caron et al. 2020, arXiv 2006.09882)."""
    q = torch.softmax(logits.flatten() / TEACHER_TEMPERATURE, 0).view_as(logits)
    for _ in range(SINKHORN_ITERATIONS):
        q = q / (q.sum(0, keepdim=True) * q.shape[1] + 1e-12)
        q = q / (q.sum(1, keepdim=True) * q.shape[0] + 1e-12)
    return q * q.shape[0]


def koleo(features: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour on the unit sphere (Sablayrolles et al. 2019)."""
    unit = F.normalize(features, dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    return -torch.log((unit - unit[nearest]).norm(dim=-1) + 1e-6).mean()


def views(size: int, scale: tuple[float, float]) -> nn.Module:
    """Random crops of an area fraction in `scale`, with random brightness, contrast and blur."""
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=scale, ratio=(0.8, 1.25), cropping_mode="resample"),
        K.RandomBrightness((0.8, 1.2), p=0.8),
        K.RandomContrast((0.7, 1.3), p=0.8),
        K.RandomGaussianBlur((3, 3), (0.1, 1.0), p=0.3),
    )
