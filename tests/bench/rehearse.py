"""`make rehearse`: every stage on real full-size films, a few and five times as many, as a user's commands.

Prints per stage the seconds and the peak memory (of all processes, and of the driver) at both sizes, and what the
seconds come to at 868,000 images on one such machine and on 16. Memory must not grow with the set.

    python tests/bench/rehearse.py [--images 20000 100000] [--size 256] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REAL = Path(os.environ.get("RAYOGRAPH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "kermany-fullres"
WHOLE, NODES = 868_000, 16
SPREAD = ("ingest", "latents", "sample")  # stages whose work Ray spreads over all nodes, image by image
GROWTH = 1.10  # of memory, at most
SETTINGS = (  # few steps of small networks: how stages read, hold and write is what is rehearsed
    "data=folder", "data.near_duplicates=null", "autoencoder.channels=[8,8,16,16]", "autoencoder.images=256",
    "encoder.images=512", "encoder.options={patch_size: 32, embed_dim: 64, depth: 2, num_heads: 2}", "encoder.batch=32",
    "trainer.images=2560", "trainer.checkpoint_every=1280", "validate.every=null", "denoiser.channels=[16,32]",
    "denoiser.attention=[false,true]", "denoiser.norm_groups=8", "denoiser.head_dim=8", "sample.steps=2",
    "sample.images=512", "evaluate.images=500", "finetune.images=512", "finetune.eval_images=2000", "changed=redo",
)
STAGES = ("ingest", "autoencoder", "encoder", "latents", "train", "sample", "evaluate", "finetune", "report")


def make_films(root: Path, count: int) -> None:
    """So many full-size X-rays: real ones under many names, each with bytes of its own after the end of its image."""
    films = [path.read_bytes() for path in sorted(REAL.rglob("*.jp*g"))]
    if not films:
        sys.exit(f"{REAL} holds no films; set RAYOGRAPH_TEST_DATA")
    for k in range(count):
        folder = root / ("NORMAL", "PNEUMONIA")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"person{k // 2}_{k}.jpg").write_bytes(films[k % len(films)] + k.to_bytes(8, "little"))


def rayograph(stage: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "pipelines.cli", stage, *SETTINGS, *overrides], check=True)


def rehearse(root: Path, storage: Path, images: int, size: int) -> dict[str, dict]:
    """Metrics of every stage at so many images, and of a second training that streams."""
    common = (f"data.root={root}", f"data.images={images}", f"data.size={size}", f"storage={storage}",
              f"name=n{images}", "data.patient_regex='person(\\d+)_'")
    for stage in STAGES:
        rayograph(stage, *common)
    found = {stage: read(storage / f"n{images}" / stage) for stage in STAGES}
    rayograph("train", *common, "trainer.reader=stream")
    return found | {"train, stream": read(storage / f"n{images}" / "train")}


def read(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())["metrics"]


def table(few: dict[str, dict], many: dict[str, dict], images: list[int]) -> tuple[str, list[str]]:
    """The table, and the stages whose memory grows."""
    lines = [f"{'stage':<14}" + "".join(f"{head:>16}" for head in (
        f"s at {images[0]:,}", f"s at {images[1]:,}", f"s at {WHOLE:,}", f"on {NODES} nodes", "MiB", "MiB", "growth",
        "driver MiB", "driver MiB"))]
    grown = []
    for stage, last in many.items():
        first = few[stage]
        slope = max(last["seconds"] - first["seconds"], 0) / (images[1] - images[0])
        rest = slope * (WHOLE - images[1])
        nodes = NODES if stage in SPREAD else 1
        growth = last["peak_rss_mb"] / first["peak_rss_mb"]
        if growth > GROWTH:
            grown.append(stage)
        fixed = max(last["seconds"] - slope * images[1], 0)
        values = (f"{first['seconds']:.0f}", f"{last['seconds']:.0f}", f"{last['seconds'] + rest:,.0f}",
                  f"{fixed + slope * WHOLE / nodes:,.0f}", f"{first['peak_rss_mb']:,.0f}",
                  f"{last['peak_rss_mb']:,.0f}", f"{growth:.2f}", f"{first['driver_rss_mb']:,.0f}",
                  f"{last['driver_rss_mb']:,.0f}")
        lines.append(f"{stage:<14}" + "".join(f"{value:>16}" for value in values))
    return "\n".join(lines), grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[20_000, 100_000], metavar=("FEW", "MANY"))
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--folder", help="where films and results are made, and removed at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root, storage = Path(name) / "films", Path(name) / "runs"
        make_films(root, max(arguments.images))
        few, many = (rehearse(root, storage, images, arguments.size) for images in arguments.images)
    text, grown = table(few, many, arguments.images)
    print(text)
    if grown:
        sys.exit(f"memory grows by more than {GROWTH - 1:.0%} in: {', '.join(grown)}")


if __name__ == "__main__":
    main()
