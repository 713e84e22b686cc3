"""Stage `latents`: every clean image encoded once, as posterior mean and log-variance and as a DINO embedding.

Ray Data reads and decodes on CPUs, encodes in an actor pool that keeps the networks loaded, and commits shard by shard.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data.records import latents_schema
from pipelines.data.streaming import shard_numbers, stream
from pipelines.data.tables import pixels, read_shard, read_table, shard_name, tensors, write_shard
from pipelines.progress import bar
from pipelines.stage import Metrics, Stage

KEPT = ("image_id", "patient_id", "labels", "split")


def latents(stage: Stage) -> Metrics:
    """Returns the number of images, images/s, and the mean and deviation of each latent channel."""
    images, out = stage.input("ingest") / "images", stage.folder
    done = set(out.names(".parquet"))
    blocks = shard_numbers([int(name[5:10]) for name in images.names(".parquet") if name not in done])
    encode = Encode(stage.input("autoencoder"), stage.input("encoder"), stage.settings.latents.batch)
    total = stage.metrics_of("ingest")["images"]
    with bar("latents", total) as shown:
        shown.to(read_table(out, ["image_id"]).num_rows)
        speed = stream(blocks, [(Read(images), {}), encode_operator(encode, stage.resources), (Write(out), {})], shown)
    means = tensors(read_table(out, ["latent_mean"]), "latent_mean").astype(np.float32)
    metrics: Metrics = {
        "images": len(means),
        "shape": list(means.shape[1:]),
        "channel_mean": means.mean((0, 2, 3)).round(4).tolist(),
        "channel_std": means.std((0, 2, 3)).round(4).tolist(),
    }
    assert len(means) == total, f"{len(means)} latents of {total} images"
    return metrics | ({"images_per_second": speed} if speed else {})


def encode_operator(encode: Encode, resources: Resources) -> tuple[Any, dict[str, Any]]:
    """One actor per GPU; without GPUs one actor that uses the cores which Ray Data leaves to it."""
    from ray.data import ActorPoolStrategy

    pool = ActorPoolStrategy(size=max(resources.gpus, 1))
    return Encoding, {"compute": pool, "fn_constructor_args": (encode,), "num_cpus": 1,
                      "ray_remote_args_fn": _give_up_after_3,
                      **({"num_gpus": 1} if resources.gpus else {})}


def _give_up_after_3() -> dict[str, int]:
    return {"max_task_retries": 3}  # Ray Data's default is to try a shard that kills its actor for ever


class Read:
    """Ray Data operator: the number of a shard to its decoded images, uint8."""

    def __init__(self, images: Folder) -> None:
        self.images = images

    def __call__(self, block: pa.Table) -> pa.Table:
        index = block["shard"][0].as_py()
        table = read_shard(self.images, shard_name(index), ["image", *KEPT])
        decoded = pixels(table)
        flat = pa.array([image.tobytes() for image in decoded], pa.binary())
        side = pa.array([decoded.shape[-1]] * len(decoded), pa.int32())
        shard = pa.array([index] * len(decoded), pa.int32())
        kept = table.select(KEPT)
        return kept.append_column("pixels", flat).append_column("side", side).append_column("shard", shard)


class Encode:
    """What an encoding actor needs to start: where the networks are, and the batch."""

    def __init__(self, autoencoder: Folder, encoder: Folder, batch: int) -> None:
        self.autoencoder, self.encoder, self.batch = autoencoder, encoder, batch


class Encoding:
    """Ray Data actor: decoded images to latents (posterior mean and log-variance) and embeddings."""

    def __init__(self, encode: Encode) -> None:
        import torch

        from cluster.session import device, use_all_cores
        from pipelines.generator.autoencoder import load_autoencoder
        from pipelines.generator.encoder import load_encoder

        use_all_cores()
        layout = torch.channels_last
        self.autoencoder = load_autoencoder(encode.autoencoder).to(device(), memory_format=layout)
        self.encoder = load_encoder(encode.encoder).to(device())
        self.batch = encode.batch

    def __call__(self, block: pa.Table) -> pa.Table:
        from pipelines.generator.encoder import embed

        side = block["side"][0].as_py()
        images = np.stack([np.frombuffer(row.as_py(), np.uint8) for row in block["pixels"]]).reshape(-1, 1, side, side)
        found = self._posteriors(images) | {"embedding": embed(self.encoder, images, self.batch).half().numpy()}
        columns = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
                   for name, values in found.items()}
        table = block.select([*KEPT, "shard"])
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table

    def _posteriors(self, images: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        from pipelines.generator.autoencoder import in_range
        from pipelines.generator.fit import autocast

        means, logvars = [], []
        with torch.no_grad(), autocast():
            for start in range(0, len(images), self.batch):
                posterior = self.autoencoder.encode(in_range(images[start : start + self.batch], self.autoencoder))
                means.append(posterior.latent_dist.mean.half().cpu())
                logvars.append(posterior.latent_dist.logvar.half().cpu())
        return {"latent_mean": torch.cat(means).numpy(), "latent_logvar": torch.cat(logvars).numpy()}


class Write:
    """Ray Data operator: commit one encoded shard."""

    def __init__(self, out: Folder) -> None:
        self.out = out

    def __call__(self, block: pa.Table) -> pa.Table:
        latent = block.schema.field("latent_mean").type.shape
        embedding = block.schema.field("embedding").type.shape[0]
        schema = latents_schema(tuple(latent), embedding)
        write_shard(self.out, block["shard"][0].as_py(), block.select(schema.names).cast(schema), replace=False)
        return pa.table({"rows": [block.num_rows]})
