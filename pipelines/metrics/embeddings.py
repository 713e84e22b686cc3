"""How much a set of embeddings tells: its effective rank, and what a k-NN probe reads from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20  # of the k-NN probe, as in DINO


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (N, D) (RankMe, Garrido et al. 2023)."""
    values = torch.linalg.svdvals(embeddings - embeddings.mean(0))
    share = values / values.sum()
    return torch.exp(-(share * torch.log(share + 1e-12)).sum()).item()


def knn_auc(train: Tensor, train_targets: Tensor, query: Tensor, targets: Tensor) -> float:
    """Macro AUC of the share of positive labels among the nearest training images whose label is known.

    Args:
        train, query: embeddings (N, D) and (M, D).
        train_targets, targets: int (N, L) and (M, L): 1, 0, or -1 where the label is unknown, which counts nowhere.
            Every label is both 1 and 0 somewhere in `targets`.
    """
    from torchmetrics.functional.classification import multilabel_auroc

    nearest = (F.normalize(query, dim=1) @ F.normalize(train, dim=1).T).topk(min(NEIGHBOURS, len(train))).indices
    found = train_targets[nearest]  # (M, neighbours, L)
    known = (found >= 0).sum(1)
    scores = torch.where(known > 0, (found > 0).sum(1) / known.clamp(min=1), 0.5)
    return round(multilabel_auroc(scores, targets.int(), num_labels=targets.shape[1], ignore_index=-1).item(), 4)
