"""Ingest through Ray Data against a plain multiprocessing pool: PIL open, convert, resize, save, on the same cores."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image
from report import emit

from cluster.session import session
from cluster.storage import Folder
from pipelines.compose import load_settings
from pipelines.data.ingest import Decode, Write, shard_rows
from pipelines.data.sources import find_source
from pipelines.data.split import assign
from pipelines.data.streaming import stream
from pipelines.data.thorax import render
from pipelines.progress import bar

IMAGES, UNIQUE, SIDE, SHARD = 3000, 40, 1024, 150


def make_films(folder: Path) -> None:
    """Full-size JPEGs: few distinct films under many names."""
    folder.mkdir()
    for k in range(UNIQUE):
        Image.fromarray(render(0, k, 512).image).resize((SIDE, SIDE)).save(folder / f"{k:05d}.jpg", quality=90)
    for k in range(UNIQUE, IMAGES):
        shutil.copyfile(folder / f"{k % UNIQUE:05d}.jpg", folder / f"{k:05d}.jpg")


def convert(arguments: tuple[Path, Path, int]) -> None:
    source, target, size = arguments
    Image.open(source).convert("L").resize((size, size), Image.Resampling.BICUBIC).save(target / f"{source.stem}.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as aside:
        root = Path(aside) / "films"
        make_films(root)
        settings = load_settings("data=folder", f"data.root={root}", "data.deduplicate=false").data
        out = Path(aside) / "plain"
        out.mkdir()
        work = [(path, out, settings.size) for path in sorted(root.iterdir())]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            pool.map(convert, work[: 2 * SHARD], chunksize=1)  # workers start and import
            start = time.perf_counter()
            pool.map(convert, work[2 * SHARD :], chunksize=64)
            plain = (IMAGES - 2 * SHARD) / (time.perf_counter() - start)
        table = Folder(str(Path(aside) / "ours"))
        manifest = assign(find_source("folder").manifest(settings, 0), settings)
        blocks = [shard_rows(manifest, index, SHARD) for index in range(-(-IMAGES // SHARD))]
        operators = [(Decode(settings), {}), (Write(table / "images", table / "quarantine"), {})]
        with session(), bar("ingest", IMAGES) as shown:
            stream(blocks[:2], operators, shown)  # workers start and import
            rate = stream(blocks[2:], operators, shown)
        assert rate is not None
        emit("ingest", rate / plain, 1.0, images_per_second=round(rate, 1), baseline=round(plain, 1), images=IMAGES,
             side=SIDE, against="multiprocessing pool, PIL open-convert-resize-save")


if __name__ == "__main__":
    main()
