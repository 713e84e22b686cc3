"""The k-NN probe, in blocks and with labels of which not all are known."""

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_auroc

from pipelines.metrics import embeddings
from pipelines.metrics.embeddings import effective_rank, knn_auc


def normal(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


TRAIN, QUERY = normal(300, 0), normal(90, 1)
TRAIN_TARGETS, TARGETS = ((part[:, :3] + 0.5 * part[:, 3:6] > 0).int() for part in (TRAIN, QUERY))


@pytest.mark.parametrize("block", [7, 1_024])
def test_the_probe_equals_the_direct_computation(monkeypatch, block):
    monkeypatch.setattr(embeddings, "QUERIES", block)
    nearest = (F.normalize(QUERY) @ F.normalize(TRAIN).T).topk(20).indices
    direct = multilabel_auroc(TRAIN_TARGETS[nearest].float().mean(1), TARGETS, num_labels=3).item()
    assert knn_auc(TRAIN, TRAIN_TARGETS, QUERY, TARGETS) == pytest.approx(direct, abs=1e-4)


def test_a_set_with_one_label_is_probed():
    assert knn_auc(TRAIN, TRAIN_TARGETS[:, :1], QUERY, TARGETS[:, :1]) > 0.8


def test_unknown_labels_count_nowhere():
    unknown = TARGETS.clone()
    unknown[::3] = -1
    known = unknown[:, 0] >= 0
    assert knn_auc(TRAIN, TRAIN_TARGETS, QUERY, unknown) == knn_auc(TRAIN, TRAIN_TARGETS, QUERY[known], TARGETS[known])


def test_the_effective_rank_is_the_number_of_equal_directions():
    corners = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(corners) == pytest.approx(5, rel=1e-4)
