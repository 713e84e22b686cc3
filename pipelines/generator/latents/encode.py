"""Stage `latents`: encodes every clean image once, as posterior mean and log-variance and as a DINO embedding.

Ray Data reads and decodes on CPUs, encodes in an actor pool that keeps the networks loaded, and commits shard by shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import UserError
from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data.labels import STATE_COLUMNS
from pipelines.data.structures import is_outlined, pixel_values
from pipelines.generator.latents.spec import write_latents, write_spec
from pipelines.generator.settings import LatentsSettings
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import bar
from pipelines.tables.images import decode_image, decode_images
from pipelines.tables.parquet import read_split, row_count, shard_name
from pipelines.tables.schemas import latents_schema
from pipelines.tables.streaming import shard_numbers, stream

KEPT = ("image_id", "source", "patient_id", *STATE_COLUMNS, "split")
NARROW = 0.01  # of a channel's variance: below it log-variances are not stored, only means
ACTORS = 8  # largest number without GPUs: each holds both networks and torch


def latents(stage: Stage) -> Metrics:
    """Returns the number of images, images/s, the mean and deviation of each latent channel, and the set's key.

    Each shard of images becomes a file per split: train-00012.parquet, and val- and test- if it has such images. The
    train file is written last and marks the shard as done. spec.json describes the table.

    Raises UserError if the folder holds latents of other network weights.
    """
    images, out, settings = stage.input("ingest") / "images", stage.folder, stage.section(LatentsSettings)
    key = claim(stage)
    done = {number(name) for name in out.names(".parquet") if name.startswith("train-")}
    blocks = shard_numbers([index for name in images.names(".parquet") if (index := number(name)) not in done])
    encoding = EncodingSpec(stage.input("autoencoder"), stage.input("encoder"), settings, keeps_logvar(stage))
    total = stage.metrics_of("ingest")["images"]
    with bar("latents", total) as progress:
        progress.to(total - sum(row_count(images, shard_name(block["shard"][0].as_py())) for block in blocks))
        encode = encode_operator(encoding, stage.resources, len(blocks))
        operators = [(ReadImages(images, settings.masks), {"num_cpus": 0.5}), encode,
                     (WriteLatents(out, settings.masks), {"num_cpus": 0.25})]
        speed = stream(blocks, operators, progress)
    statistics = write_spec(out)
    assert statistics["images"] == total, f"{statistics['images']} latents of {total} images"
    return statistics | {"key": key} | ({"images_per_second": speed} if speed else {})


def claim(stage: Stage) -> str:
    """Record the key of these latents, or check that it is the recorded one.

    Returns:
        The key: a hash of both networks' weights and of the fingerprint of the images.
    """
    digest = hashlib.sha256(stage.record_of("ingest")["fingerprint"].encode())
    for network in ("autoencoder", "encoder"):
        model = stage.input(network) / "model"
        for name in model.names():
            digest.update(hashlib.sha256(model.read(name)).digest())
    key = digest.hexdigest()[:16]
    claimed = stage.folder.read_json("key.json") or {"key": key}
    if claimed["key"] != key:
        raise UserError(f"{stage.folder.uri} was started with other network weights (key {claimed['key']}, now {key}): "
                         f"the model in {stage.input('autoencoder').uri} or {stage.input('encoder').uri} was replaced; "
                         "delete the folder to encode all images again")
    stage.folder.write_json("key.json", {"key": key})
    return key


def keeps_logvar(stage: Stage) -> bool:
    """Whether log-variances are stored: `latents.logvar`, or if that is null, unless posteriors are narrow."""
    requested = stage.section(LatentsSettings).logvar
    return stage.metrics_of("autoencoder")["posterior_share"] > NARROW if requested is None else requested


def encode_operator(encoding: EncodingSpec, resources: Resources, shards: int) -> tuple[Any, dict[str, Any]]:
    """The encoding operator: one actor per GPU; without GPUs one per CPU, up to ACTORS; at most one per shard.

    A CPU actor reserves half of its cores, as Ray Data needs the others to read and write.
    """
    from ray.data import ActorPoolStrategy

    actors = max(1, min(resources.gpus or min(resources.cpus, ACTORS), shards))
    threads = None if resources.gpus else resources.cpus_each(actors)
    reserved = resources.accelerator if threads is None else {"num_cpus": threads / 2}
    return EncodeImages, {"compute": ActorPoolStrategy(size=actors), "fn_constructor_args": (encoding, threads),
                          "ray_remote_args_fn": _give_up_after_3, **reserved}


def _give_up_after_3() -> dict[str, int]:
    return {"max_task_retries": 3}  # by default Ray Data retries a shard that kills its actor without limit


class ReadImages:
    """Ray Data operator: a shard number to its decoded images and masks, uint8; of all splits or one."""

    def __init__(self, images: Folder, masks: Sequence[str], split: str | None = None) -> None:
        self.images, self.masks, self.split = images, masks, split

    def __call__(self, block: pa.Table) -> pa.Table:
        index = block["shard"][0].as_py()
        columns = ["image", *KEPT, *(["mask", "structures"] if self.masks else [])]
        table = read_split(self.images, shard_name(index), columns, self.split)
        decoded = decode_images(table)
        flat = pa.array([image.tobytes() for image in decoded], pa.binary())
        side = pa.array([decoded.shape[-1]] * len(decoded), pa.int32())
        shard = pa.array([index] * len(decoded), pa.int32())
        kept = table.select(KEPT)
        if self.masks:
            maps = [None if mask["bytes"].as_py() is None else decode_image(mask).tobytes() for mask in table["mask"]]
            kept = kept.append_column("mask", pa.array(maps, pa.binary()))
            kept = kept.append_column("structures", table["structures"])
        return kept.append_column("pixels", flat).append_column("side", side).append_column("shard", shard)


class EncodingSpec:
    """The parameters of an encoding actor: the folders of the networks, and what to store."""

    def __init__(self, autoencoder: Folder, encoder: Folder, settings: LatentsSettings, logvar: bool) -> None:
        self.autoencoder, self.encoder, self.settings, self.logvar = autoencoder, encoder, settings, logvar


class EncodeImages:
    """Ray Data actor: decoded images to latents (mean, log-variance), embeddings, patch features and masks."""

    def __init__(self, encoding: EncodingSpec, threads: int | None) -> None:
        import torch

        from cluster.session import device, use_cores
        from pipelines.generator.autoencoder.model import load_autoencoder
        from pipelines.generator.encoder.vit import load_encoder

        use_cores(threads)
        layout = torch.channels_last
        self.autoencoder = load_autoencoder(encoding.autoencoder).to(device(), memory_format=layout)
        self.encoder = load_encoder(encoding.encoder).to(device())
        self.settings, self.batch, self.logvar = encoding.settings, encoding.settings.batch, encoding.logvar

    def __call__(self, block: pa.Table) -> pa.Table:
        side = block["side"][0].as_py()
        images = np.stack([np.frombuffer(row.as_py(), np.uint8) for row in block["pixels"]]).reshape(-1, 1, side, side)
        columns = self._posteriors(images) | self._embeddings(images)
        if self.settings.masks:
            latent, masks = columns["latent_mean"].shape[-1], self.settings.masks
            outlined = [row.as_py() or () for row in block["structures"]]
            columns["mask"] = np.stack([mask_planes(mask.as_py(), names, side, latent, masks)
                                        for mask, names in zip(block["mask"], outlined, strict=True)])
        table = block.select([*KEPT, "shard"])
        for name, values in columns.items():
            table = table.append_column(name, pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values)))
        return table

    def _embeddings(self, images: np.ndarray) -> dict[str, np.ndarray]:
        from pipelines.generator.encoder.vit import embed, embed_patches

        if not self.settings.patch_grid:
            return {"embedding": embed(self.encoder, images, self.batch).half().numpy()}
        embedding, patches = embed_patches(self.encoder, images, self.batch, self.settings.patch_grid)
        return {"embedding": embedding.half().numpy(), "patches": patches.half().numpy()}

    def _posteriors(self, images: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        from pipelines.generator.autoencoder.model import to_model_range
        from pipelines.learning.precision import autocast

        means: list[torch.Tensor] = []
        logvars: list[torch.Tensor] = []
        with torch.no_grad(), autocast():
            for start in range(0, len(images), self.batch):
                batch = to_model_range(images[start : start + self.batch], self.autoencoder)
                posterior = self.autoencoder.encode(batch).latent_dist
                means.append(posterior.mean.half())
                logvars += [posterior.logvar.half()] if self.logvar else []
        arrays = {"latent_mean": torch.cat(means).cpu().numpy()}
        return arrays | ({"latent_logvar": torch.cat(logvars).cpu().numpy()} if self.logvar else {})


def mask_planes(mask: bytes | None, outlined: Collection[str], side: int, latent: int,
                structures: Sequence[str]) -> np.ndarray:
    """Area fraction of each structure in each latent cell: float16 (structures, latent, latent).

    A structure that is not annotated (`outlined`) in the image is -1 everywhere: unknown, not empty.
    """
    planes = np.full((len(structures), latent, latent), -1, np.float16)
    numbers = np.frombuffer(mask or b"", np.uint8).reshape(-1, side)
    step = side // latent
    for plane, structure in zip(planes, structures, strict=True):
        if is_outlined(structure, outlined):
            inside = np.isin(numbers, pixel_values(structure))
            plane[:] = inside.reshape(latent, step, latent, step).mean((1, 3))
    return planes


class WriteLatents:
    """Ray Data operator: commit one encoded shard."""

    def __init__(self, out: Folder, structures: Sequence[str]) -> None:
        self.out, self.structures = out, structures

    def __call__(self, block: pa.Table) -> pa.Table:
        shape = {field.name: tuple(field.type.shape) for field in block.schema
                 if isinstance(field.type, pa.FixedShapeTensorType)}
        schema = latents_schema(shape["latent_mean"], shape["embedding"][0], shape.get("patches", (0,))[0],
                                self.structures, "latent_logvar" in shape)
        write_latents(self.out, block["shard"][0].as_py(), block.select(schema.names).cast(schema))
        return pa.table({"rows": [block.num_rows]})


def number(name: str) -> int:
    """The shard number in a file name."""
    return int(name.removesuffix(".parquet").rpartition("-")[2])
