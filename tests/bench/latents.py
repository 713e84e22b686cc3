"""Encoding through Ray Data against a bare loop over the same networks, batch and precision, images in memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pyarrow as pa
from report import emit

from cluster.session import session, use_all_cores
from cluster.storage import Folder
from pipelines.compose import load_settings
from pipelines.data.latents import Encode, Encoding, Read, Write, encode_operator
from pipelines.data.records import IMAGES
from pipelines.data.streaming import shard_numbers, stream
from pipelines.data.tables import pixels, png, read_table, write_shard
from pipelines.data.thorax import render
from pipelines.generator.autoencoder import build, set_statistics
from pipelines.generator.components.encoder import Encoder
from pipelines.generator.weights import save_model
from pipelines.progress import bar

SHARDS, ROWS, WARM = 24, 256, 4


def make_inputs(root: Folder, settings) -> None:
    """A table of films, and both networks as they are before training."""
    films = [png(render(0, k, settings.data.size).image) for k in range(ROWS)]
    for shard in range(SHARDS):
        rows = [{"image_id": f"{shard}-{k}", "image": film, "patient_id": "p", "labels": [], "split": "train"}
                for k, film in enumerate(films)]
        write_shard(root / "images", shard, pa.Table.from_pylist(rows, schema=IMAGES))
    autoencoder = build(settings.autoencoder, settings.data.size)
    set_statistics(autoencoder, pixels(read_table(root / "images", ["image"]))[:64], 64)
    save_model(root / "autoencoder", autoencoder)
    encoder = Encoder(settings.encoder.architecture, settings.data.size, mean=0.5, std=0.25,
                      options=settings.encoder.options)
    save_model(root / "encoder", encoder)


def main() -> None:
    settings = load_settings("profile=demo")
    with tempfile.TemporaryDirectory() as aside:
        root = Folder(str(Path(aside)))
        make_inputs(root, settings)
        encode = Encode(root / "autoencoder", root / "encoder", settings.latents.batch)
        with session() as resources, bar("latents", SHARDS * ROWS) as shown:
            operators = [(Read(root / "images"), {}), encode_operator(encode, resources), (Write(root / "latents"), {})]
            stream(shard_numbers(range(WARM)), operators, shown)
            rate = stream(shard_numbers(range(WARM, SHARDS)), operators, shown)
        assert rate
        use_all_cores()
        block = Read(root / "images")(pa.table({"shard": pa.array([0], pa.int32())}))
        bare = Encoding(encode)
        bare(block)
        start = time.perf_counter()
        for _ in range(WARM, SHARDS):
            bare(block)
        plain = (SHARDS - WARM) * ROWS / (time.perf_counter() - start)
        emit("latents", rate / plain, 0.9, images_per_second=round(rate, 1), baseline=round(plain, 1),
             images=(SHARDS - WARM) * ROWS, batch=settings.latents.batch,
             against="bare loop over the same networks, images in memory, nothing written")


if __name__ == "__main__":
    main()
