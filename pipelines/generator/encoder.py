"""Stage `encoder`: the image encoder whose embedding conditions the generator.

Weights come from the Hub through timm (`encoder.pretrained`), or are learned here by DINO (Caron et al. 2021,
arXiv 2104.14294) on the train split, with two choices of DINOv2 (Oquab et al. 2023, arXiv 2304.07193) that keep small
sets from collapsing: Sinkhorn-Knopp centring and the KoLeo term. Views are not mirrored: the heart is on the left.
"""

from __future__ import annotations

import copy
from typing import Any

import kornia.augmentation as K
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.session import compute, device
from cluster.storage import Folder
from pipelines.data.split import check_filled
from pipelines.data.tables import known_labels, multi_hot, pixels, read_table
from pipelines.generator.components.encoder import Encoder
from pipelines.generator.fit import CHECKPOINT, autocast, fit, to_device
from pipelines.generator.weights import load_model, save_model
from pipelines.progress import follow
from pipelines.settings import Encoder as EncoderSettings
from pipelines.stage import Metrics, Stage

STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.05
SINKHORN_ITERATIONS = 3
NEIGHBOURS = 20  # of the k-NN probe, as in DINO
# Weights that are not timm's: the architecture, and what to replace in timm's description of it.
ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "rad-dino": ("vit_base_patch14_dinov2.lvd142m", {  # Perez-Garcia et al. 2024, arXiv 2401.10815: 0.9 M chest X-rays
        "hf_hub_id": "microsoft/rad-dino", "hf_hub_filename": "backbone_compatible.safetensors",
        "mean": (0.5307,) * 3, "std": (0.2583,) * 3}),
}


def encoder(stage: Stage) -> Metrics:
    """Returns the embeddings' effective rank and a k-NN probe's AUC on the val split."""
    settings = stage.settings.encoder
    work = (stage.folder, stage.input("ingest") / "images", settings, stage.settings.data.size, stage.settings.seed)
    splits = stage.metrics_of("ingest")["splits"]
    check_filled(splits)
    with follow(stage.folder, "encoder", settings.total(splits["train"])):
        return compute(stage.resources, _make, *work)


def _make(folder: Folder, table: Folder, settings: EncoderSettings, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    rows = {split: read_table(table, ["image", "labels"], split) for split in ("train", "val")}
    train = pixels(rows["train"])
    if settings.pretrained:
        model = from_timm(settings.pretrained, size).to(device())
    else:
        levels = train.astype(np.float32) / 255
        side = whole_patches(size, timm.create_model(settings.architecture, **settings.options))
        model = Encoder(settings.architecture, side, mean=float(levels.mean()), std=float(levels.std()),
                        options=settings.options)
        dino = Dino(model, settings).to(device())
        fit(dino, lambda batch, progress: dino.loss(to_device(train[batch], device()), progress), settings, len(train),
            seed, folder)
        model = dino.teacher.encoder
    model.eval()
    found = {"train": embed(model, train, settings.batch), "val": embed(model, pixels(rows["val"]), settings.batch)}
    metrics: Metrics = {"dim": model.embedding_dim, "effective_rank": round(effective_rank(found["train"]), 2)}
    labels = known_labels(rows["train"])
    if labels:
        targets = {split: torch.from_numpy(multi_hot(rows[split], labels)) for split in rows}
        judged = [k for k in range(len(labels)) if 0 < targets["val"][:, k].sum() < len(targets["val"])]
        if judged:
            metrics["knn_auc"] = knn_auc(found["train"], targets["train"][:, judged], found["val"],
                                         targets["val"][:, judged])
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"parameters": sum(p.numel() for p in model.parameters()),
                      "weights": settings.pretrained
                      or f"DINO on {settings.total(len(train))} images of the train split"}


def from_timm(name: str, size: int) -> Encoder:
    """A vision transformer with its Hub weights, for gray images of `size` pixels (rounded to whole patches).

    Raises ValueError where there is no such model, or its weights are not to be had.
    """
    architecture, other = ELSEWHERE.get(name, (name, None))
    try:
        with torch.device("meta"):
            plain = timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=other)
        mean, std = (float(np.mean(plain.pretrained_cfg[key])) for key in ("mean", "std"))
        side = whole_patches(size, plain)
        model = Encoder(architecture, side, 3, mean, std)
        source = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=other, num_classes=0,
                                   img_size=side, dynamic_img_size=True)
    except (RuntimeError, AttributeError, TypeError, OSError) as error:  # of timm, and of the Hub
        raise ValueError(f"encoder.pretrained={name}: {error}; it must be rad-dino, or a vision transformer of timm "
                         "whose weights this machine can download, such as vit_base_patch14_dinov2.lvd142m") from error
    model.vit.load_state_dict(source.state_dict())
    return model


def whole_patches(size: int, vit: Any) -> int:
    """`size` in pixels, rounded down to whole patches of a timm vision transformer; at least one."""
    patch: int = vit.patch_embed.patch_size[0]
    return max(size // patch, 1) * patch


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
    """Student and teacher; the teacher is the student's moving average and ends as the encoder."""

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


def views(size: int, scale: tuple[float, float]) -> nn.Module:
    """Random crops of a share `scale` of the area, with the exposure varied as between radiographs."""
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=scale, ratio=(0.8, 1.25), cropping_mode="resample"),
        K.RandomBrightness((0.8, 1.2), p=0.8),
        K.RandomContrast((0.7, 1.3), p=0.8),
        K.RandomGaussianBlur((3, 3), (0.1, 1.0), p=0.3),
    )


@torch.no_grad()
def sinkhorn(logits: Tensor) -> Tensor:
    """Soft assignments (B, K) that use all prototypes alike (Caron et al. 2020, arXiv 2006.09882)."""
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


@torch.no_grad()
def embed(model: Encoder, images: np.ndarray, batch: int) -> Tensor:
    """Embeddings (N, D) float32 on the host of uint8 images (N, 1, H, W)."""
    with autocast():
        parts = [model.embed(to_device(images[i : i + batch], device())) for i in range(0, len(images), batch)]
    return torch.cat(parts).cpu()


@torch.no_grad()
def embed_patches(model: Encoder, images: np.ndarray, batch: int, grid: int) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D), and patch features (N, grid * grid, D), float32 on the host of uint8 images (N, 1, H, W)."""
    with autocast():
        parts = [model.embed_patches(to_device(images[i : i + batch], device()), grid)
                 for i in range(0, len(images), batch)]
    embeddings, patches = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return embeddings, patches


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (N, D) (RankMe, Garrido et al. 2023)."""
    values = torch.linalg.svdvals(embeddings - embeddings.mean(0))
    share = values / values.sum()
    return torch.exp(-(share * torch.log(share + 1e-12)).sum()).item()


def knn_auc(train: Tensor, train_targets: Tensor, query: Tensor, targets: Tensor) -> float:
    """Macro AUC of the share of positive labels among the nearest training images."""
    from torchmetrics.functional.classification import multilabel_auroc

    nearest = (F.normalize(query, dim=1) @ F.normalize(train, dim=1).T).topk(min(NEIGHBOURS, len(train))).indices
    scores = train_targets[nearest].mean(1)
    return round(multilabel_auroc(scores, targets.int(), num_labels=targets.shape[1]).item(), 4)


def load_encoder(folder: Folder) -> Encoder:
    return load_model(folder, Encoder)
