"""Encoding through Ray Data against a bare loop over the same networks, batch and precision, images in memory."""

from __future__ import annotations

import tempfile
import time

import pyarrow as pa
from report import Clock, emit

from cluster.session import Resources, session
from cluster.storage import Folder
from pipelines.data.phantom import render
from pipelines.generator.autoencoder.model import new_autoencoder, set_statistics
from pipelines.generator.latents.encode import EncodeImages, EncodingSpec, ReadImages, WriteLatents, encode_operator
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.graph.compose import load_settings
from pipelines.learning.weights import save_model
from pipelines.tables.images import decode_images, encode_png
from pipelines.tables.parquet import read_shard, shard_name, write_shard
from pipelines.tables.schemas import IMAGES
from pipelines.tables.streaming import shard_numbers, stream

SHARDS, ROWS = 24, 256


def make_inputs(root: Folder, settings) -> None:
    """A table of films, and both networks as they are before training."""
    films = [encode_png(render(0, k, settings.data.size).image) for k in range(ROWS)]
    for shard in range(SHARDS):
        rows = [{"image_id": f"{shard}-{k}", "image": film, "patient_id": "p", "labels": [], "split": "train"}
                for k, film in enumerate(films)]
        write_shard(root / "images", shard, pa.Table.from_pylist(rows, schema=IMAGES))
    autoencoder = new_autoencoder(settings.autoencoder, settings.data.size)
    set_statistics(autoencoder, decode_images(read_shard(root / "images", shard_name(0), ["image"]))[:64], 64)
    save_model(root / "autoencoder", autoencoder)
    encoder = Encoder(settings.encoder.architecture, settings.data.size, mean=0.5, std=0.25,
                      options=settings.encoder.options)
    save_model(root / "encoder", encoder)


def through_ray(root: Folder, encode: EncodingSpec, resources: Resources) -> float:
    """Images/s of Ray Data's operators."""
    clock = Clock()
    encoding = encode_operator(encode, resources, SHARDS)
    operators = [(ReadImages(root / "images", 0), {}), encoding, (WriteLatents(root / "latents", ()), {})]
    stream(shard_numbers(range(SHARDS)), operators, clock)
    return clock.steady()


def main() -> None:
    settings = load_settings("profile=demo")
    with tempfile.TemporaryDirectory() as staging_dir:
        root = Folder(staging_dir)
        make_inputs(root, settings)
        encode = EncodingSpec(root / "autoencoder", root / "encoder", settings.latents, True)
        bare = EncodeImages(encode, None)  # on every core
        block = ReadImages(root / "images", 0)(shard_numbers([0])[0])

        def loop() -> float:
            start = time.perf_counter()
            for _ in range(SHARDS // 2):
                bare(block)
            return SHARDS // 2 * ROWS / (time.perf_counter() - start)

        bare(block)
        before = loop()
        with session() as resources:
            rate = through_ray(root, encode, resources)
        plain = (before + loop()) / 2
        emit("latents", rate / plain, 0.9, images_per_second=round(rate, 1), baseline=round(plain, 1),
             images=SHARDS * ROWS, batch=settings.latents.batch,
             against="bare loop over the same networks, images in memory, nothing written")


if __name__ == "__main__":
    main()
