"""`rayograph latents report=true`: a quality report on the cached latents, before training on them."""

from __future__ import annotations

import numpy as np
import torch
from monai.metrics import compute_ms_ssim
from torchmetrics.functional.image import peak_signal_noise_ratio

from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.autoencoder.model import decode_latents, load_autoencoder
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.metrics.diversity import KERNEL, scale_weights
from pipelines.metrics.embeddings import effective_rank
from pipelines.tables.draw import draw_rows
from pipelines.tables.images import images_by_id
from pipelines.tables.parquet import tensors

TRAIN_IMAGES = 2_000  # sampled for the statistics
TEST_IMAGES = 512  # sampled and decoded for PSNR and MS-SSIM
SEED = 0
BATCH = 64


def latents_report(run: Folder) -> str:
    """Channel statistics, KL, reconstruction and embedding statistics of the run in a folder, as text."""
    spec = read_latent_spec(run / "latents")
    columns = ["latent_mean", "embedding", *(["latent_logvar"] if spec.logvar else [])]
    train = draw_rows(run / "latents", TRAIN_IMAGES, SEED, columns, "train", None)
    values = {name: torch.from_numpy(tensors(train, name).astype(np.float32)) for name in columns}
    mean, embedding = values["latent_mean"], values["embedding"]
    psnr, ms_ssim, tested = _reconstruction(run)
    norms = embedding.norm(dim=1)
    lines = [
        f"latents of {' x '.join(map(str, mean.shape[1:]))}; statistics of {len(mean):,} train images",
        "",
        "channel       mean       std",
        *(f"{k:>7} {mean[:, k].mean():>10.3f} {mean[:, k].std():>9.3f}" for k in range(mean.shape[1])),
        "",
        *(_posteriors(mean, values["latent_logvar"]) if spec.logvar else ["log-variances are not stored"]),
        f"reconstruction              PSNR {psnr:.2f} dB, MS-SSIM {ms_ssim:.4f} ({tested} test images)",
        f"embedding                   width {embedding.shape[1]}, norm {norms.mean():.2f} +- {norms.std():.2f}, "
        f"effective rank {effective_rank(embedding):.1f}",
    ]
    return "\n".join(lines)


def _posteriors(mean: torch.Tensor, logvar: torch.Tensor) -> list[str]:
    """Standard deviation by channel and KL of posteriors (N, c, h, w)."""
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    stds = (0.5 * logvar).exp().mean((0, 2, 3)).tolist()
    return [f"posterior std by channel    {', '.join(f'{std:.4f}' for std in stds)}",
            f"KL to the standard normal   {kl.mean():.1f} nats per image, {kl.mean() / mean[0].numel():.2f} per value"]


def _reconstruction(run: Folder) -> tuple[float, float, int]:
    """PSNR (dB) and MS-SSIM between sampled test images and their cached latents, decoded; and their number."""
    cached = draw_rows(run / "latents", TEST_IMAGES, SEED, ["image_id", "latent_mean"], "test", None)
    real = torch.from_numpy(images_by_id(run / "ingest" / "images", cached["image_id"].to_pylist())).float()
    means = torch.from_numpy(tensors(cached, "latent_mean").astype(np.float32))
    model = load_autoencoder(run / "autoencoder").to(device())
    decoded = torch.cat([decode_latents(model, means[k : k + BATCH].to(device()))
                         for k in range(0, len(means), BATCH)]) * 255
    similarity = compute_ms_ssim(decoded, real, 2, data_range=255.0, kernel_size=KERNEL,
                                 weights=scale_weights(real.shape[-1]))
    return peak_signal_noise_ratio(decoded, real, data_range=255.0).item(), similarity.mean().item(), len(real)
