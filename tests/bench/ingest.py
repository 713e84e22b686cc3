"""Ingest of full-size JPEGs against pools of the same cores: a plain one (PIL open, resize, save), and one of our own
decoding without Ray around it; then the whole command, its start included."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from report import Clock, emit

from cluster.session import session
from cluster.storage import Folder
from pipelines.data.convert import ConvertShard
from pipelines.data.manifest import write_manifest
from pipelines.data.phantom import render
from pipelines.data.settings import DataSettings
from pipelines.data.sources import find_source
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.graph.stage import Stage
from pipelines.tables.images import encode_png
from pipelines.tables.shards import run_shards
from pipelines.tables.streaming import shard_numbers

IMAGES, WHOLE, UNIQUE, ROUNDS = 8_192, 8_000, 40, 2
PATIENTS = "data.patient_regex='film(\\d+)_'"  # copies of a film are one patient's, so that nobody changes split
REAL = Path(os.environ.get("RAYOGRAPH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "kermany-fullres"


def make_films(folder: Path) -> None:
    """Full-size JPEGs, few distinct ones under many names: real ones where they are at hand, else phantoms."""
    folder.mkdir()
    originals = folder.parent / "originals"
    originals.mkdir()
    films = sorted(path for path in REAL.rglob("*") if path.suffix in (".jpeg", ".jpg"))
    if not films:
        for k in range(UNIQUE):
            film = originals / f"{k}.jpg"
            large = Image.fromarray(render(0, k, 512).image).resize((1600, 1280), Image.Resampling.BICUBIC)
            large.save(film, quality=90)
            films.append(film)
    films = [Path(shutil.copy(film, originals)) if film.parent != originals else film for film in films]
    for k in range(max(IMAGES, WHOLE)):
        os.link(films[k % len(films)], folder / f"film{k % len(films)}_{k:05d}.jpg")


def convert(arguments: tuple[Path, Path, DataSettings]) -> None:
    source, target, settings = arguments
    size = settings.size
    Image.open(source).convert("L").resize((size, size), Image.Resampling.BICUBIC).save(target / f"{source.stem}.png")


def decode_bare(arguments: tuple[Path, Path, DataSettings]) -> None:
    source, target, settings = arguments
    row = {"path": source.name, "view": None, "masks": []}
    image = find_source("folder").load(row, settings).image
    (target / f"{source.stem}.png").write_bytes(encode_png(image)["bytes"])


class Pool:
    """A warm pool of one process a core."""

    def __init__(self, function: Callable[[tuple[Path, Path, DataSettings]], None], target: Path,
                 settings: DataSettings) -> None:
        self.function, self.target, self.settings = function, target, settings
        target.mkdir()
        self.pool = multiprocessing.get_context("spawn").Pool(os.cpu_count())

    def rate(self, films: list[Path]) -> float:
        """Images/s."""
        start = time.perf_counter()
        self.pool.map(self.function, [(path, self.target, self.settings) for path in films], chunksize=64)
        return len(films) / (time.perf_counter() - start)


def through_ray(stage: Stage, turn: int) -> float:
    """Images/s of Ray Data's operator."""
    out, data = stage.folder / str(turn), stage.section(DataSettings)
    rows = write_manifest(out / "manifest", data, stage.seed, Folder(stage.settings.storage))
    clock = Clock()
    run_shards(ConvertShard(out, data), shard_numbers(range(rows // data.shard_rows)), clock)
    return clock.steady()


def whole_command(root: Path, storage: Path) -> float:
    """Images/s of `rayograph ingest`, from the shell's prompt to the next."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipelines.cli", "ingest", "data=folder", f"data.root={root}",
                    "data.deduplicate=false", PATIENTS, f"data.images={WHOLE}", f"storage={storage}", "name=whole"],
                   check=True, capture_output=True)
    return WHOLE / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        aside, root = Path(name), Path(name) / "films"
        make_films(root)
        settings = load_settings("data=folder", f"data.root={root}", "data.deduplicate=false", PATIENTS,
                                 f"storage={aside}", "name=ours", f"data.images={IMAGES}")
        films = sorted(root.iterdir())[:IMAGES]
        plain, bare = (Pool(function, aside / function.__name__, settings.data) for function in (convert, decode_bare))
        rates: dict[str, list[float]] = {"ours": [], "plain": [], "bare": []}
        with session() as resources:
            for turn in range(ROUNDS + 1):  # in turn, for the machine's speed drifts; the first warms up
                found = {"bare": bare.rate(films[: IMAGES // 2]), "plain": plain.rate(films[: IMAGES // 4]),
                         "ours": through_ray(Plan(settings).stage("ingest", resources), turn)}
                for kind, rate in found.items() if turn else ():
                    rates[kind].append(rate)
        ours, slow, fast = (statistics.mean(rates[kind]) for kind in ("ours", "plain", "bare"))
        emit("ingest", ours / slow, 2.0, images_per_second=round(ours, 1), baseline=round(slow, 1),
             images=ROUNDS * IMAGES, against="multiprocessing pool, PIL open-convert-resize-save")
        emit("ingest_bare", ours / fast, 0.9, images_per_second=round(ours, 1), baseline=round(fast, 1),
             against="multiprocessing pool of the same decoding")
        whole = whole_command(root, aside)
        emit("ingest_command", whole / slow, 1.6, images_per_second=round(whole, 1), baseline=round(slow, 1),
             images=WHOLE, against="the warm plain pool; the command with its start")


if __name__ == "__main__":
    main()
