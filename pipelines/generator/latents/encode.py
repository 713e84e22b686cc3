"""Stage `latents`: every clean image encoded once, as posterior mean and log-variance and as a DINO embedding.

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
from pipelines.data.labels import STATES
from pipelines.data.structures import is_outlined, pixel_values
from pipelines.generator.latents.spec import write_latents, write_spec
from pipelines.generator.settings import LatentsSettings
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import bar
from pipelines.tables.images import picture, pixels
from pipelines.tables.parquet import read_split, row_count, shard_name
from pipelines.tables.schemas import latents_schema
from pipelines.tables.streaming import shard_numbers, stream

KEPT = ("image_id", "source", "patient_id", *STATES, "split")
NARROW = 0.01  # of a latent's variance: posteriors of less width are kept as their means alone
ACTORS = 8  # without GPUs, at most: each holds both networks and torch


def latents(stage: Stage) -> Metrics:
    """Returns the number of images, images/s, the mean and deviation of each latent channel, and the set's key.

    Of each shard of images there is a file for every split: train-00012.parquet, and val- and test- where it has such
    images. That of train is written last and marks the shard as done. spec.json tells what the table holds.

    Raises UserError when the folder holds a part of the latents of other weights.
    """
    images, out, settings = stage.input("ingest") / "images", stage.folder, stage.section(LatentsSettings)
    key = claim(stage)
    done = {number(name) for name in out.names(".parquet") if name.startswith("train-")}
    blocks = shard_numbers([index for name in images.names(".parquet") if (index := number(name)) not in done])
    encode = Encode(stage.input("autoencoder"), stage.input("encoder"), settings, keeps_logvar(stage))
    total = stage.metrics_of("ingest")["images"]
    with bar("latents", total) as shown:
        shown.to(total - sum(row_count(images, shard_name(block["shard"][0].as_py())) for block in blocks))
        encoding = encode_operator(encode, stage.resources, len(blocks))
        operators = [(ReadImages(images, settings.masks), {}), encoding, (WriteLatents(out, settings.masks), {})]
        speed = stream(blocks, operators, shown)
    statistics = write_spec(out)
    assert statistics["images"] == total, f"{statistics['images']} latents of {total} images"
    return statistics | {"key": key} | ({"images_per_second": speed} if speed else {})


def claim(stage: Stage) -> str:
    """Write down whose latents these are, or see that they are the same as before.

    Returns:
        The key of the set: a hash of both networks' weights and of the images they encode, which stand for the
        preprocessing and the size.
    """
    told = hashlib.sha256(stage.record_of("ingest")["fingerprint"].encode())
    for network in ("autoencoder", "encoder"):
        model = stage.input(network) / "model"
        for name in model.names():
            told.update(hashlib.sha256(model.read(name)).digest())
    key = told.hexdigest()[:16]
    claimed = stage.folder.read_json("key.json") or {"key": key}
    if claimed["key"] != key:
        raise UserError(f"{stage.folder.uri} was begun as latents of other weights (key {claimed['key']}, not {key}): "
                         f"what lies in {stage.input('autoencoder').uri} or {stage.input('encoder').uri} was replaced; "
                         "remove the folder to have all images encoded anew")
    stage.folder.write_json("key.json", {"key": key})
    return key


def keeps_logvar(stage: Stage) -> bool:
    """Whether the width of the posteriors is kept: as the settings say, else where it is not narrow."""
    chosen = stage.section(LatentsSettings).logvar
    return stage.metrics_of("autoencoder")["posterior_share"] > NARROW if chosen is None else chosen


def encode_operator(encode: Encode, resources: Resources, shards: int) -> tuple[Any, dict[str, Any]]:
    """One actor per GPU; without GPUs one per core or two, which wait for no thread of their own; none without a shard.

    Such an actor reserves half of its cores: Ray Data needs the others to read and to write.
    """
    from ray.data import ActorPoolStrategy

    actors = max(1, min(resources.gpus or min(resources.cpus, ACTORS), shards))
    threads = None if resources.gpus else resources.cpus_each(actors)
    reserved = {"num_gpus": 1, "num_cpus": 1} if threads is None else {"num_cpus": threads / 2}
    return Encoding, {"compute": ActorPoolStrategy(size=actors), "fn_constructor_args": (encode, threads),
                      "ray_remote_args_fn": _give_up_after_3, **reserved}


def _give_up_after_3() -> dict[str, int]:
    return {"max_task_retries": 3}  # Ray Data's default is to try a shard that kills its actor for ever


class ReadImages:
    """Ray Data operator: the number of a shard to its decoded images, and masks, uint8; of all splits or one."""

    def __init__(self, images: Folder, masks: Sequence[str], split: str | None = None) -> None:
        self.images, self.masks, self.split = images, masks, split

    def __call__(self, block: pa.Table) -> pa.Table:
        index = block["shard"][0].as_py()
        columns = ["image", *KEPT, *(["mask", "structures"] if self.masks else [])]
        table = read_split(self.images, shard_name(index), columns, self.split)
        decoded = pixels(table)
        flat = pa.array([image.tobytes() for image in decoded], pa.binary())
        side = pa.array([decoded.shape[-1]] * len(decoded), pa.int32())
        shard = pa.array([index] * len(decoded), pa.int32())
        kept = table.select(KEPT)
        if self.masks:
            maps = [None if mask["bytes"].as_py() is None else picture(mask).tobytes() for mask in table["mask"]]
            kept = kept.append_column("mask", pa.array(maps, pa.binary()))
            kept = kept.append_column("structures", table["structures"])
        return kept.append_column("pixels", flat).append_column("side", side).append_column("shard", shard)


class Encode:
    """What an encoding actor needs to start: where the networks are, and what to keep of them."""

    def __init__(self, autoencoder: Folder, encoder: Folder, settings: LatentsSettings, logvar: bool) -> None:
        self.autoencoder, self.encoder, self.settings, self.logvar = autoencoder, encoder, settings, logvar


class Encoding:
    """Ray Data actor: decoded images to latents (posterior mean and log-variance), embeddings and what else is kept."""

    def __init__(self, encode: Encode, threads: int | None) -> None:
        import torch

        from cluster.session import device, use_cores
        from pipelines.generator.autoencoder.model import load_autoencoder
        from pipelines.generator.encoder.vit import load_encoder

        use_cores(threads)
        layout = torch.channels_last
        self.autoencoder = load_autoencoder(encode.autoencoder).to(device(), memory_format=layout)
        self.encoder = load_encoder(encode.encoder).to(device())
        self.settings, self.batch, self.logvar = encode.settings, encode.settings.batch, encode.logvar

    def __call__(self, block: pa.Table) -> pa.Table:
        side = block["side"][0].as_py()
        images = np.stack([np.frombuffer(row.as_py(), np.uint8) for row in block["pixels"]]).reshape(-1, 1, side, side)
        found = self._posteriors(images) | self._embeddings(images)
        if self.settings.masks:
            latent, masks = found["latent_mean"].shape[-1], self.settings.masks
            outlined = [row.as_py() or () for row in block["structures"]]
            found["mask"] = np.stack([mask_planes(mask.as_py(), names, side, latent, masks)
                                      for mask, names in zip(block["mask"], outlined, strict=True)])
        table = block.select([*KEPT, "shard"])
        for name, values in found.items():
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

        from pipelines.generator.autoencoder.model import in_range
        from pipelines.learning.precision import autocast

        means: list[torch.Tensor] = []
        logvars: list[torch.Tensor] = []
        with torch.no_grad(), autocast():
            for start in range(0, len(images), self.batch):
                posterior = self.autoencoder.encode(in_range(images[start : start + self.batch], self.autoencoder))
                means.append(posterior.latent_dist.mean.half())
                logvars += [posterior.latent_dist.logvar.half()] if self.logvar else []
        found = {"latent_mean": torch.cat(means).cpu().numpy()}
        return found | ({"latent_logvar": torch.cat(logvars).cpu().numpy()} if self.logvar else {})


def mask_planes(mask: bytes | None, outlined: Collection[str], side: int, latent: int,
                structures: Sequence[str]) -> np.ndarray:
    """Share of each structure in the area of each place of the latent: float16 (structures, latent, latent).

    A structure that is not `outlined` in the image is -1 everywhere: unknown, not empty.
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
    """Of the shard that a file is of."""
    return int(name.removesuffix(".parquet").rpartition("-")[2])
