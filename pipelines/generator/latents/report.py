"""`rayograph latents report=true`: are the cached latents worth training on, before anyone spends a GPU-hour."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from monai.metrics import compute_ms_ssim
from torchmetrics.functional.image import peak_signal_noise_ratio

from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.autoencoder.model import load_autoencoder, pictures
from pipelines.metrics.diversity import KERNEL, scale_weights
from pipelines.metrics.embeddings import effective_rank
from pipelines.tables.images import pixels
from pipelines.tables.parquet import read_shard, tensors

SHARDS = 32  # evenly spread over the set, and looked at whole
IMAGES = 512  # of their test images, decoded for PSNR and MS-SSIM
BATCH = 64


def latents_report(run: Folder) -> str:
    """Channel statistics, KL, reconstruction and embedding statistics of the run in a folder, as a table of text."""
    names = (run / "latents").names(".parquet")
    names = names[:: -(-len(names) // SHARDS)]
    columns = ["image_id", "latent_mean", "latent_logvar", "embedding", "split"]
    table = pa.concat_tables([read_shard(run / "latents", name, columns) for name in names])
    train, test = (table.filter(pc.field("split") == split) for split in ("train", "test"))
    mean, logvar, embedding = (torch.from_numpy(tensors(train, name).astype(np.float32))
                               for name in ("latent_mean", "latent_logvar", "embedding"))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    psnr, ms_ssim, shown = _reconstruction(run, names, test.slice(0, IMAGES))
    norms = embedding.norm(dim=1)
    lines = [
        f"latents of {' x '.join(map(str, mean.shape[1:]))}; {len(mean):,} of the train split looked at",
        "",
        "channel       mean       std   posterior std",
        *(f"{k:>7} {mean[:, k].mean():>10.3f} {mean[:, k].std():>9.3f} {(0.5 * logvar[:, k]).exp().mean():>15.4f}"
          for k in range(mean.shape[1])),
        "",
        f"KL to the standard normal   {kl.mean():.1f} nats an image, {kl.mean() / mean[0].numel():.2f} a value",
        f"reconstruction              PSNR {psnr:.2f} dB, MS-SSIM {ms_ssim:.4f} (of {shown} test images)",
        f"embedding                   width {embedding.shape[1]}, norm {norms.mean():.2f} +- {norms.std():.2f}, "
        f"effective rank {effective_rank(embedding):.1f}",
    ]
    return "\n".join(lines)


def _reconstruction(run: Folder, names: list[str], cached: pa.Table) -> tuple[float, float, int]:
    """PSNR (dB) and MS-SSIM between images of these shards and what the autoencoder makes of their cached latents."""
    wanted = cached["image_id"].combine_chunks()
    shards = (read_shard(run / "ingest" / "images", name, ["image_id", "image"]) for name in names)
    images = pa.concat_tables([shard.filter(pc.is_in(shard["image_id"], wanted)) for shard in shards])
    images = images.take(pc.index_in(cached["image_id"], images["image_id"].combine_chunks()))
    real = torch.from_numpy(pixels(images)).float()
    means = torch.from_numpy(tensors(cached, "latent_mean").astype(np.float32))
    model = load_autoencoder(run / "autoencoder").to(device())
    found = torch.cat([pictures(model, means[k : k + BATCH].to(device())) for k in range(0, len(means), BATCH)]) * 255
    similarity = compute_ms_ssim(found, real, 2, data_range=255.0, kernel_size=KERNEL,
                                 weights=scale_weights(real.shape[-1]))
    return peak_signal_noise_ratio(found, real, data_range=255.0).item(), similarity.mean().item(), len(real)
