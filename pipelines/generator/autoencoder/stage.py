"""Stage `autoencoder`: diffusers' AutoencoderKL, named on the Hub or trained here on the train split; or pixels as
they are (`autoencoder.space=pixel`)."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from diffusers import ModelMixin
from monai.metrics import compute_ms_ssim
from torchmetrics.image import PeakSignalNoiseRatio

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.data.split import check_filled
from pipelines.generator.autoencoder.losses import Reconstruction
from pipelines.generator.autoencoder.model import in_range, make_model, pictures, reconstruct, set_statistics
from pipelines.generator.settings import AutoencoderSettings
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.precision import autocast
from pipelines.learning.readers import ImageReader
from pipelines.learning.small_loop import CHECKPOINT, train_small_network
from pipelines.learning.weights import save_model
from pipelines.metrics.diversity import KERNEL, scale_weights
from pipelines.monitor.progress import follow
from pipelines.tables.draw import draw_rows
from pipelines.tables.images import pixels

DRAWN = 2_000  # images that suffice for the mean and deviation of a latent channel, and for PSNR, MS-SSIM and KL
SHOWN = 8


def autoencoder(stage: Stage) -> Metrics:
    """Returns PSNR (dB), MS-SSIM and the mean KL (nats an image) over a sample of the test split, and the size."""
    settings = stage.section(AutoencoderSettings)
    work = (stage.folder, stage.input("ingest") / "images", settings, stage.metrics_of("ingest")["size"], stage.seed)
    splits = stage.metrics_of("ingest")["splits"]
    check_filled(splits)
    with follow(stage.folder, "autoencoder", settings.training_images(splits["train"])):
        return compute(stage.resources, train_autoencoder, *work)


def train_autoencoder(folder: Folder, table: Folder, settings: AutoencoderSettings, size: int, seed: int) -> Metrics:
    torch.manual_seed(seed)
    model = make_model(settings, size).to(device())
    trained = settings.space == "latent" and settings.pretrained is None
    seen = 0
    if trained:
        reader, learner = ImageReader([(table, "train")], seed), Reconstruction(model, settings).to(device())
        seen = settings.training_images(reader.n)
        train_small_network(learner, lambda batch, progress: learner.loss(batch.inputs, progress),
                            settings, reader, seed, folder)
    model.eval()
    train, test, shown = (pixels(draw_rows(table, n, seed, ["image"], split))
                          for n, split in ((DRAWN, "train"), (DRAWN, "test"), (SHOWN, "test")))
    share = set_statistics(model, train, settings.batch)
    metrics = {} if settings.space == "pixel" else measure(model, test, settings.batch)
    save_pictures(folder, model, shown)
    save_model(folder, model)
    folder.remove(CHECKPOINT)
    return metrics | {"space": settings.space, "posterior_share": float(f"{share:.4g}"),
                      "parameters": sum(p.numel() for p in model.parameters()),
                      "trained_images": seen}


@torch.no_grad()
def measure(model: ModelMixin, images: np.ndarray, batch: int) -> Metrics:
    """PSNR (dB) of all pixels together, mean MS-SSIM and mean KL of uint8 images (N, 1, H, W), a batch at a time."""
    psnr, similar, divergence = PeakSignalNoiseRatio(data_range=1.0), [], []
    weights = scale_weights(images.shape[-1])
    for chunk in (images[i : i + batch] for i in range(0, len(images), batch)):
        with autocast():
            posterior = model.encode(in_range(chunk, model)).latent_dist
        found, real = pictures(model, posterior.mean), torch.from_numpy(chunk).float() / 255
        psnr.update(found, real)
        similar.append(compute_ms_ssim(found, real, 2, data_range=1.0, kernel_size=KERNEL, weights=weights))
        divergence.append(posterior.kl().float())
    return {"psnr": round(psnr.compute().item(), 3), "ms_ssim": round(torch.cat(similar).mean().item(), 4),
            "kl": round(torch.cat(divergence).mean().item(), 2)}


def save_pictures(folder: Folder, model: ModelMixin, images: np.ndarray) -> None:
    """reconstructions.png: originals above, reconstructions below."""
    import os

    from torchvision.utils import save_image

    rows = torch.cat([torch.from_numpy(images).float() / 255, reconstruct(model, images)])
    with tempfile.TemporaryDirectory() as aside:
        save_image(rows, os.path.join(aside, "r.png"), nrow=len(images))
        with open(os.path.join(aside, "r.png"), "rb") as file:
            folder.write("reconstructions.png", file.read())
