"""Peak memory of `rayograph ingest` at 20,000 and at 200,000 images: what is streamed does not grow with the set."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from report import emit

from pipelines.data.phantom import render

FEW, MANY, UNIQUE, FOLDERS = 20_000, 200_000, 50, 100


def peak(root: Path, storage: Path, images: int) -> dict:
    subprocess.run([sys.executable, "-m", "pipelines.cli", "ingest", "data=folder", f"data.root={root}", "data.size=32",
                    "data.deduplicate=false", f"data.images={images}", f"storage={storage}", f"name=n{images}"],
                   check=True, capture_output=True)
    return json.loads((storage / f"n{images}" / "ingest" / "stage.json").read_text())["metrics"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root, storage = Path(name) / "films", Path(name) / "runs"
        contents = []
        for k in range(UNIQUE):
            buffer = io.BytesIO()
            Image.fromarray(render(0, k, 64).image).save(buffer, "JPEG", quality=90)
            contents.append(buffer.getvalue())
        for k in range(MANY):
            folder = root / f"{k % FOLDERS:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            if k < UNIQUE:
                (folder / f"{k:06d}.jpg").write_bytes(contents[k])
            else:
                os.link(root / f"{k % UNIQUE:03d}" / f"{k % UNIQUE:06d}.jpg", folder / f"{k:06d}.jpg")
        few, many = peak(root, storage, FEW), peak(root, storage, MANY)
    assert (few["images"], many["images"]) == (FEW, MANY)
    emit("memory", few["peak_rss_mb"] / many["peak_rss_mb"], 0.9, images=[FEW, MANY],
         peak_rss_mb=[few["peak_rss_mb"], many["peak_rss_mb"]], seconds=[few["seconds"], many["seconds"]],
         against="the same command on a tenth of the images")


if __name__ == "__main__":
    main()
