"""Stage `encoder`: the image encoder whose embedding conditions the generator.

Its weights are from the Hub through timm (`encoder.pretrained`), or trained by DINO on the train split (`dino`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import timm
import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import run_on_accelerator
from pipelines.data.labels import ABSENT, PRESENT, STATE_COLUMNS, label_states, present_findings
from pipelines.data.split import check_filled
from pipelines.generator.encoder.dino import Dino
from pipelines.generator.encoder.vit import embed, from_timm, whole_patches
from pipelines.generator.settings import EncoderSettings
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.precision import to_device
from pipelines.learning.readers import ImageReader
from pipelines.learning.small_loop import CHECKPOINT, train_small_network
from pipelines.learning.weights import save_model
from pipelines.metrics.embeddings import effective_rank, knn_auc
from pipelines.monitor.progress import follow
from pipelines.tables.draw import iterate_drawn
from pipelines.tables.images import decode_image, decode_images

STATISTICS_IMAGES = 2_000  # sampled from the train split for the mean and standard deviation of its pixels
PROBE_IMAGES = {"train": 20_000, "val": 5_000}  # sampled from each split for the effective rank and k-NN probe


def encoder(stage: Stage) -> Metrics:
    """Returns the embeddings' effective rank and the AUC of a k-NN probe on the val split, both of samples."""
    settings = stage.section(EncoderSettings)
    ingested = stage.metrics_of("ingest")
    splits = ingested["splits"]
    check_filled(splits)
    arguments = (stage.folder, stage.input("ingest") / "images", settings, ingested["size"], stage.seed)
    with follow(stage.folder, "encoder", settings.training_images(splits["train"])):
        return run_on_accelerator(stage.resources, train_encoder, *arguments)


def train_encoder(folder: Folder, table: Folder, settings: EncoderSettings, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    if settings.pretrained:
        model, weights = from_timm(settings.pretrained, size).to(device()), settings.pretrained
    else:
        mean, std = pixel_statistics(table, seed)
        side = whole_patches(size, timm.create_model(settings.architecture, **settings.options))
        model = Encoder(settings.architecture, side, mean=mean, std=std, options=settings.options)
        dino, reader = Dino(model, settings).to(device()), ImageReader([(table, "train")], seed)
        weights = f"DINO on {settings.training_images(reader.n)} images of the train split"
        train_small_network(dino, lambda batch, progress: dino.loss(to_device(batch.inputs, device()), progress),
                            settings, reader, seed, folder)
        model = dino.teacher.encoder
    metrics = probe(model.eval(), table, settings.batch, seed)
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"parameters": sum(p.numel() for p in model.parameters()), "weights": weights}


def pixel_statistics(table: Folder, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of pixels in [0, 1], over a sample of the train split."""
    counts = sum(np.bincount(decode_image(image).ravel(), minlength=256)
                 for shard in iterate_drawn(table, STATISTICS_IMAGES, seed, ["image"], "train")
                 for image in shard["image"])
    levels = np.arange(256) / 255
    mean = np.average(levels, weights=counts)
    return float(mean), float(np.sqrt(np.average((levels - mean) ** 2, weights=counts)))


def probe(model: Encoder, table: Folder, batch: int, seed: int) -> Metrics:
    """Dimension and effective rank of the embeddings, and with labels the AUC of a k-NN probe."""
    (train, train_labels), (val, val_labels) = (embed_drawn(model, table, split, batch, seed) for split in PROBE_IMAGES)
    metrics: Metrics = {"dim": model.embedding_dim, "effective_rank": round(effective_rank(train), 2)}
    labels = present_findings(train_labels)
    targets = torch.from_numpy(label_states(val_labels, labels))
    testable = [k for k in range(len(labels)) if {ABSENT, PRESENT} <= set(targets[:, k].tolist())]
    if testable:
        train_targets = torch.from_numpy(label_states(train_labels, labels))[:, testable]
        metrics["knn_auc"] = knn_auc(train, train_targets, val, targets[:, testable])
    return metrics


def embed_drawn(model: Encoder, table: Folder, split: str, batch: int, seed: int) -> tuple[Tensor, pa.Table]:
    """Embeddings (N, D) and labels of a sample of a split; one shard of images is in memory at a time."""
    embeddings, labels = [], []
    for shard in iterate_drawn(table, PROBE_IMAGES[split], seed, ["image", *STATE_COLUMNS], split):
        embeddings.append(embed(model, decode_images(shard), batch))
        labels.append(shard.select(STATE_COLUMNS))
    return torch.cat(embeddings), pa.concat_tables(labels)
