"""The list of 868,000 images: looked at, split, committed, searched for copies, planned; beside a part of it.

Prints for each number of images the seconds of each step, and the peak memory of the driver and of all processes. No
image is read, so that the list may name files that are not there.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Folder
from pipelines.data.deduplicate import COLUMNS, decide
from pipelines.data.labels import STATE_COLUMNS
from pipelines.data.manifest import write_manifest
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.graph.run import order
from pipelines.monitor.memory import PeakMemory
from pipelines.tables.parquet import read_columns

IMAGES = (20_000, 100_000, 868_000)
COPIES = 0.1  # of the images, each with up to 6 of 256 bits of another's hash changed
FINDINGS = ("No Finding", "Atelectasis", "Cardiomegaly", "Edema", "Pneumonia")


def write_list(path: Path, images: int) -> None:
    """A list of so many images of a third as many patients; the first image is there, else the list is refused."""
    random = np.random.default_rng(0)
    paths = [f"p{k // 3000:03d}/patient{k // 3:07d}/study{k % 3}/view1_frontal.jpg" for k in range(images)]
    (path.parent / paths[0]).parent.mkdir(parents=True)
    (path.parent / paths[0]).touch()
    pq.write_table(pa.table({
        "path": paths,
        "patient_id": [f"patient{k // 3:07d}" for k in range(images)], "view": ["PA"] * images,
        "labels": pa.array([[FINDINGS[k]] for k in random.integers(0, len(FINDINGS), images)])}), path)


def search(manifest: Folder, settings: object) -> int:
    """Decisions on the images of a manifest, as if each had been decoded."""
    listed = read_columns(manifest, ["uri", "split", "patient_id", *STATE_COLUMNS])
    random = np.random.default_rng(1)
    hashes = random.integers(0, 256, (listed.num_rows, 32), np.uint8)
    copies = random.permutation(listed.num_rows)[: int(COPIES * listed.num_rows)]
    hashes[copies] = hashes[(copies * 7 + 1) % listed.num_rows]
    hashes[copies, random.integers(0, 32, len(copies))] ^= 0b101010
    digests = pa.array([f"{k:064x}" for k in range(listed.num_rows)])
    table = listed.append_column("row", pa.array(np.arange(listed.num_rows))).append_column("sha256", digests)
    table = table.append_column("phash", pa.array([bytes(row) for row in hashes], pa.binary()))
    table = table.append_column("structures", pa.nulls(listed.num_rows, pa.list_(pa.string())))
    return decide(table.select(COLUMNS), settings).num_rows


def beside(function: Callable, *args: object) -> None:
    """In a process of its own, as stages do it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(function, *args).result()


def measure(images: int) -> dict[str, float]:
    """Seconds of each step, and MiB at most."""
    found: dict[str, float] = {"images": images}
    with tempfile.TemporaryDirectory() as name:
        beside(write_list, Path(name) / "list.parquet", images)
        settings = load_settings("data=manifest", f"data.root={name}/list.parquet", f"storage={name}/runs",
                                 "name=whole")
        out = Folder(f"{name}/runs/whole/ingest/manifest")
        steps = {"plan": lambda: Plan(settings, looked_at=["ingest"]).check(order(settings), redo=True),
                 "manifest": lambda: write_manifest(out, settings.data, settings.seed, Folder(settings.storage)),
                 "copies": lambda: beside(search, out, settings.data)}
        with PeakMemory(0.1) as memory:
            for step, run in steps.items():
                start = time.perf_counter()
                run()
                found[step] = round(time.perf_counter() - start, 1)
    return found | {"driver_mb": memory.driver_mb, "all_mb": memory.peak_mb}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        print(f"{'images':>10}{'plan, s':>10}{'manifest, s':>13}{'copies, s':>11}{'driver, MiB':>13}{'all, MiB':>10}")
        for images in IMAGES:
            told = json.loads(subprocess.run([sys.executable, __file__, str(images)], check=True, text=True,
                                             stdout=subprocess.PIPE).stdout)
            print(f"{images:>10,}{told['plan']:>10.1f}{told['manifest']:>13.1f}{told['copies']:>11.1f}"
                  f"{told['driver_mb']:>13.0f}{told['all_mb']:>10.0f}", flush=True)
