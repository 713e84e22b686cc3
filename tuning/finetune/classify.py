"""A binary classifier of radiographs: network, training and evaluation.

It is a small residual network (He et al. 2016, arXiv 1512.03385) on the images, or a head on the embeddings of a frozen
encoder. Images are not mirrored in training: the heart is on the left.
"""

from __future__ import annotations

import kornia.augmentation as K
import numpy as np
import torch
from safetensors.torch import save
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_f1_score,
    binary_precision_recall_curve,
)

from cluster.session import device
from cluster.storage import Folder
from pipelines.graph.stage import Metrics
from pipelines.learning.precision import to_device
from pipelines.learning.readers import Batch, Reader
from pipelines.learning.settings import SmallTrainingSettings
from pipelines.learning.small_loop import train_small_network
from tuning.finetune.examples import Examples

HEAD_WIDTH = 128
NEUTRAL_THRESHOLD = 0.5


def residual_network(channels: list[int]) -> nn.Module:
    """A ResNet-D for one-channel images with one basic block per level, each of half the side of the one before.

    Its 3×3 stem is not followed by pooling, unlike for ImageNet: 64-pixel images have 32×32 features. Shortcuts average
    before they halve the side (He et al. 2018, arXiv 1812.01187): they drop no pixel, and a 1×1 convolution of stride 2
    with fewer than 16 channels crashes oneDNN (torch 2.14, float32, channels_last, AVX-512).
    Images are floats in [0, 1] (B, 1, H, W), logits (B, 1).
    """
    blocks = tuple(ByoBlockCfg("basic", d=1, c=width, s=2 if level else 1, gs=0, br=1.0)
                   for level, width in enumerate(channels))
    shape = ByoModelCfg(blocks=blocks, downsample="avg", stem_type="3x3", stem_pool="", stem_chs=channels[0])
    return ByobNet(shape, num_classes=1, in_chans=1).to(memory_format=torch.channels_last)


def embedding_head(width: int) -> nn.Module:
    """Two-layer perceptron from embeddings (B, width) to logits (B, 1)."""
    return nn.Sequential(nn.Linear(width, HEAD_WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(HEAD_WIDTH, 1))


def augmentation() -> nn.Module:
    """Small random shifts, rotations and scalings, and exposure changes, per image."""
    return nn.Sequential(
        K.RandomAffine(degrees=5, translate=(0.06, 0.06), scale=(0.9, 1.1), padding_mode="border", p=1.0),
        K.RandomBrightness((0.85, 1.15), p=0.8),
        K.RandomContrast((0.8, 1.2), p=0.8),
    )


def to_tensor(inputs: np.ndarray) -> Tensor:
    """Images as floats in [0, 1], or embeddings as they are, on the device."""
    return to_device(inputs, device()) if inputs.dtype == np.uint8 else torch.from_numpy(inputs).to(device())


def train(model: nn.Module, reader: Reader, settings: SmallTrainingSettings, seed: int, folder: Folder) -> None:
    """Minimise the binary cross-entropy over `settings.images` examples, repeats counted; ends in evaluation mode.

    Args:
        reader: of images or embeddings, with bool targets (N,).
        folder: for the checkpoint, from which training resumes, and metrics.jsonl.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    augment = augmentation()

    def loss(batch: Batch, progress: float) -> dict[str, Tensor]:
        inputs = to_tensor(batch.inputs)
        targets = torch.from_numpy(batch.targets).to(device()).float()
        logits = model(augment(inputs) if batch.inputs.dtype == np.uint8 else inputs).float().squeeze(1)
        return {"loss": F.binary_cross_entropy_with_logits(logits, targets)}

    model.train()
    train_small_network(model, loss, settings, reader, seed, folder)
    model.eval()


@torch.no_grad()
def probabilities(model: nn.Module, examples: Examples, batch: int) -> tuple[Tensor, Tensor]:
    """Probability of the target, float32 (N,), and its state, int64 (N,), both in CPU memory.

    Not computed in bfloat16, where ties would distort the AUC.
    """
    scores: list[float] = []  # not tensors: small ones kept between large ones would fragment the heap
    truth: list[bool] = []
    for inputs, targets in examples:
        truth += targets.tolist()
        for i in range(0, len(inputs), batch):
            scores += model(to_tensor(inputs[i : i + batch])).squeeze(1).sigmoid().tolist()
    return torch.tensor(scores), torch.tensor(truth, dtype=torch.int64)


def best_threshold(scores: Tensor, targets: Tensor) -> float:
    """The threshold in [0, 1] above which calling `scores` (N,) positive gives the highest F1.

    It lies midway between two neighbouring scores. If all `targets` (N,) are equal, it is 0.5.
    """
    if targets.unique().numel() < 2:
        return NEUTRAL_THRESHOLD
    precision, recall, thresholds = binary_precision_recall_curve(scores, targets)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    best = int(f1[: len(thresholds)].argmax())
    below = thresholds[best - 1].item() if best else 0.0
    return (thresholds[best].item() + below) / 2


def evaluate_classifier(model: nn.Module, val: Examples, test: Examples, batch: int) -> Metrics:
    """AUC, F1 and accuracy on `test`, the latter two at the threshold of the highest F1 on `val`.

    `test` must hold both classes.
    """
    threshold = best_threshold(*probabilities(model, val, batch))
    scores, targets = probabilities(model, test, batch)
    return {"auc": round(binary_auroc(scores, targets).item(), 4),
            "f1": round(binary_f1_score(scores, targets, threshold).item(), 4),
            "accuracy": round(binary_accuracy(scores, targets, threshold).item(), 4),
            "threshold": round(threshold, 4)}


def save_weights(folder: Folder, model: nn.Module, **metadata: str) -> None:
    """Write model.safetensors, with `metadata`."""
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    folder.write("model.safetensors", save(weights, metadata))
