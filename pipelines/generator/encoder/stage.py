"""Stage `encoder`: the image encoder whose embedding conditions the generator.

Weights come from the Hub through timm (`encoder.pretrained`), or are learned here by DINO (Caron et al. 2021,
arXiv 2104.14294) on the train split, with two choices of DINOv2 (Oquab et al. 2023, arXiv 2304.07193) that keep small
sets from collapsing: Sinkhorn-Knopp centring and the KoLeo term. Views are not mirrored: the heart is on the left.
"""

from __future__ import annotations

import numpy as np
import timm
import torch

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.data.labels import ABSENT, PRESENT, STATES, known_labels, label_states
from pipelines.data.split import check_filled
from pipelines.generator.encoder.dino import Dino
from pipelines.generator.encoder.vit import embed, from_timm, whole_patches
from pipelines.generator.settings import Encoder as EncoderSettings
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.precision import to_device
from pipelines.learning.small_loop import CHECKPOINT, fit
from pipelines.learning.weights import save_model
from pipelines.metrics.embeddings import effective_rank, knn_auc
from pipelines.monitor.progress import follow
from pipelines.tables.images import pixels
from pipelines.tables.parquet import read_table


def encoder(stage: Stage) -> Metrics:
    """Returns the embeddings' effective rank and a k-NN probe's AUC on the val split."""
    settings = stage.section(EncoderSettings)
    work = (stage.folder, stage.input("ingest") / "images", settings, stage.metrics_of("ingest")["size"], stage.seed)
    splits = stage.metrics_of("ingest")["splits"]
    check_filled(splits)
    with follow(stage.folder, "encoder", settings.total(splits["train"])):
        return compute(stage.resources, train_encoder, *work)


def train_encoder(folder: Folder, table: Folder, settings: EncoderSettings, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    rows = {split: read_table(table, ["image", *STATES], split) for split in ("train", "val")}
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
        targets = {split: torch.from_numpy(label_states(rows[split], labels)) for split in rows}
        judged = [k for k in range(len(labels)) if {ABSENT, PRESENT} <= set(targets["val"][:, k].tolist())]
        if judged:
            metrics["knn_auc"] = knn_auc(found["train"], targets["train"][:, judged], found["val"],
                                         targets["val"][:, judged])
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"parameters": sum(p.numel() for p in model.parameters()),
                      "weights": settings.pretrained
                      or f"DINO on {settings.total(len(train))} images of the train split"}
