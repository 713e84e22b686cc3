"""Ingest of full-size JPEGs against pools of the same cores: a plain one (PIL open, resize, save), and one of our own
decoding without Ray around it; then the whole command, its start included."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from report import emit

from cluster.session import session
from pipelines.compose import load_settings
from pipelines.data.ingest import Decode, Write, write_manifest
from pipelines.data.sources import find_source
from pipelines.data.streaming import shard_numbers, stream
from pipelines.data.tables import png
from pipelines.data.thorax import render
from pipelines.progress import bar
from pipelines.settings import Data
from pipelines.stage import Stage

IMAGES, WHOLE, UNIQUE, SHARD, WARM = 5_600, 8_000, 40, 100, 6
REAL = Path(os.environ.get("RAYOGRAPH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "kermany-fullres"


def make_films(folder: Path) -> None:
    """Full-size JPEGs, few distinct ones under many names: real ones where they are at hand, else phantoms."""
    folder.mkdir()
    films = sorted(path for path in REAL.rglob("*") if path.suffix in (".jpeg", ".jpg"))
    if not films:
        for k in range(UNIQUE):
            film = folder.parent / f"{k}.jpg"
            large = Image.fromarray(render(0, k, 512).image).resize((1600, 1280), Image.Resampling.BICUBIC)
            large.save(film, quality=90)
            films.append(film)
    for k in range(WHOLE):
        shutil.copyfile(films[k % len(films)], folder / f"{k:05d}.jpg")


def convert(arguments: tuple[Path, Path, Data]) -> None:
    source, target, settings = arguments
    size = settings.size
    Image.open(source).convert("L").resize((size, size), Image.Resampling.BICUBIC).save(target / f"{source.stem}.png")


def decode_bare(arguments: tuple[Path, Path, Data]) -> None:
    source, target, settings = arguments
    row = {"uri": str(source), "view": None, "masks": []}
    image = find_source("folder").load(row, settings).image
    (target / f"{source.stem}.png").write_bytes(png(image)["bytes"])


def in_pool(function, films: list[Path], target: Path, settings: Data) -> float:
    """Images/s of a pool that is warm."""
    target.mkdir()
    work = [(path, target, settings) for path in films]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(function, work[: WARM * SHARD], chunksize=SHARD // 2)
        start = time.perf_counter()
        pool.map(function, work[WARM * SHARD :], chunksize=SHARD // 2)
        return (len(work) - WARM * SHARD) / (time.perf_counter() - start)


def through_ray(stage: Stage) -> float:
    """Images/s of Ray Data's operators, warm."""
    out = stage.folder
    rows = write_manifest(stage, out / "manifest")
    operators = [(Decode(out / "manifest", stage.settings.data), {}), (Write(out / "images", out / "quarantine"), {})]
    shards = shard_numbers(range(rows // SHARD))
    with bar("ingest", rows) as shown:
        stream(shards[:WARM], operators, shown)
        rate = stream(shards[WARM:], operators, shown)
    assert rate
    return rate


def whole_command(root: Path, storage: Path) -> float:
    """Images/s of `rayograph ingest`, from the shell's prompt to the next."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipelines.cli", "ingest", "data=folder", f"data.root={root}",
                    "data.deduplicate=false", f"storage={storage}", "name=whole"], check=True, capture_output=True)
    return WHOLE / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        aside, root = Path(name), Path(name) / "films"
        make_films(root)
        settings = load_settings("data=folder", f"data.root={root}", "data.deduplicate=false", f"storage={aside}",
                                 "name=ours", f"data.shard_rows={SHARD}", f"data.images={IMAGES}")
        films = sorted(root.iterdir())[:IMAGES]
        plain = in_pool(convert, films, aside / "plain", settings.data)
        bare = in_pool(decode_bare, films, aside / "bare", settings.data)
        with session() as resources:
            rate = through_ray(Stage("ingest", settings, resources, ""))
        emit("ingest", rate / plain, 2.0, images_per_second=round(rate, 1), baseline=round(plain, 1), images=IMAGES,
             against="multiprocessing pool, PIL open-convert-resize-save")
        emit("ingest_bare", rate / bare, 0.9, images_per_second=round(rate, 1), baseline=round(bare, 1),
             against="multiprocessing pool of the same decoding")
        whole = whole_command(root, aside)
        emit("ingest_command", whole / plain, 1.6, images_per_second=round(whole, 1), baseline=round(plain, 1),
             images=WHOLE, against="the warm plain pool; the command with its start")


if __name__ == "__main__":
    main()
