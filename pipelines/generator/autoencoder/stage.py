"""Stage `autoencoder`: diffusers' AutoencoderKL, named on the Hub or trained here on the train split; or pixels as
they are (`autoencoder.space=pixel`)."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from diffusers import ModelMixin
from monai.metrics import compute_ms_ssim
from torchmetrics.functional.image import peak_signal_noise_ratio

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.data.split import check_filled
from pipelines.generator.autoencoder.losses import Reconstruction
from pipelines.generator.autoencoder.model import in_range, make_model, reconstruct, set_statistics
from pipelines.generator.settings import Autoencoder
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.precision import autocast
from pipelines.learning.small_loop import CHECKPOINT, fit
from pipelines.learning.weights import save_model
from pipelines.metrics.diversity import KERNEL, scale_weights
from pipelines.monitor.progress import follow
from pipelines.tables.images import pixels
from pipelines.tables.parquet import read_table

STATISTICS_IMAGES = 2_000  # enough for the mean and deviation of a latent channel
SHOWN = 8


def autoencoder(stage: Stage) -> Metrics:
    """Returns PSNR (dB), MS-SSIM and the mean KL (nats an image) on the test split, and the size."""
    settings = stage.section(Autoencoder)
    work = (stage.folder, stage.input("ingest") / "images", settings, stage.metrics_of("ingest")["size"], stage.seed)
    splits = stage.metrics_of("ingest")["splits"]
    check_filled(splits)
    with follow(stage.folder, "autoencoder", settings.total(splits["train"])):
        return compute(stage.resources, train_autoencoder, *work)


def train_autoencoder(folder: Folder, table: Folder, settings: Autoencoder, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    train = pixels(read_table(table, ["image"], "train"))
    model = make_model(settings, size).to(device())
    trained = settings.space == "latent" and settings.pretrained is None
    if trained:
        learner = Reconstruction(model, settings).to(device())
        fit(learner, lambda rows, progress: learner.loss(train[rows], progress), settings, len(train), seed, folder)
    model.eval()
    set_statistics(model, train[:: -(-len(train) // STATISTICS_IMAGES)], settings.batch)
    test = pixels(read_table(table, ["image"], "test"))
    metrics = {} if settings.space == "pixel" else measure(model, test, settings.batch)
    save_pictures(folder, model, test[:SHOWN])
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"space": settings.space, "parameters": sum(p.numel() for p in model.parameters()),
                      "trained_images": settings.total(len(train)) if trained else 0}


@torch.no_grad()
def measure(model: ModelMixin, images: np.ndarray, batch: int) -> Metrics:
    chunks = [images[i : i + batch] for i in range(0, len(images), batch)]
    found = torch.cat([reconstruct(model, chunk) for chunk in chunks])
    real = torch.from_numpy(images).float() / 255
    psnr = peak_signal_noise_ratio(found, real, data_range=1.0)
    similar = compute_ms_ssim(found, real, 2, data_range=1.0, kernel_size=KERNEL,
                              weights=scale_weights(real.shape[-1])).mean()
    with autocast():
        kl = torch.cat([model.encode(in_range(chunk, model)).latent_dist.kl().float() for chunk in chunks]).mean()
    return {"psnr": round(psnr.item(), 3), "ms_ssim": round(similar.item(), 4), "kl": round(kl.item(), 2)}


def save_pictures(folder: Folder, model: ModelMixin, images: np.ndarray) -> None:
    """reconstructions.png: originals above, reconstructions below."""
    import os

    from torchvision.utils import save_image

    rows = torch.cat([torch.from_numpy(images).float() / 255, reconstruct(model, images)])
    with tempfile.TemporaryDirectory() as aside:
        save_image(rows, os.path.join(aside, "r.png"), nrow=len(images))
        with open(os.path.join(aside, "r.png"), "rb") as file:
            folder.write("reconstructions.png", file.read())
