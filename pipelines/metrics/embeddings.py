"""Quality of a set of embeddings: effective rank, and the AUC of a k-NN probe."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20  # of the k-NN probe, as in DINO
QUERIES = 1_024  # rows of similarities in memory at a time


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (N, D) (RankMe, Garrido et al. 2023).

    Time is O(N D^2): use a sample of some ten thousand rows.
    """
    values = torch.linalg.svdvals(embeddings - embeddings.mean(0))
    share = values / values.sum()
    return torch.exp(-(share * torch.log(share + 1e-12)).sum()).item()


def knn_auc(train: Tensor, train_targets: Tensor, query: Tensor, targets: Tensor) -> float:
    """Macro AUC of a k-NN probe: the score is the positive fraction among neighbours whose label is known.

    Neighbours are by cosine similarity; memory is bounded by a block of QUERIES rows of similarities.

    Args:
        train: (N, D) embeddings.
        train_targets: int (N, L): 1, 0, or -1 (unknown), which is ignored.
        query: (M, D) embeddings.
        targets: int (M, L), with both classes in each column.
    """
    from torchmetrics.functional.classification import binary_auroc

    train, k = F.normalize(train, dim=1), min(NEIGHBOURS, len(train))
    nearest = torch.cat([(block @ train.T).topk(k).indices for block in F.normalize(query, dim=1).split(QUERIES)])
    neighbours = train_targets[nearest]  # (M, neighbours, L)
    known = (neighbours >= 0).sum(1)
    scores = torch.where(known > 0, (neighbours > 0).sum(1) / known.clamp(min=1), 0.5)
    aucs = [binary_auroc(scores[:, k], targets[:, k].int(), ignore_index=-1) for k in range(targets.shape[1])]
    return round(torch.stack(aucs).mean().item(), 4)
