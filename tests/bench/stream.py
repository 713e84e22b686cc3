"""Training on images as Ray Data encodes them, against training on cached latents: the same images, network and steps.

The cached side is told with and without the time that encoding the set before has taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import emit

IMAGES = 4_096
SETTINGS = ("profile=demo", f"data.images={IMAGES}", "data.near_duplicates=null", "autoencoder.images=2048",
            "encoder.images=2048", f"trainer.images={2 * IMAGES}", f"trainer.checkpoint_every={2 * IMAGES}",
            "validate.images=0", "name=stream", "changed=redo")


def metrics(storage: str, stage: str, *overrides: str) -> dict[str, float]:
    """Of one stage, run as a user runs it."""
    subprocess.run([sys.executable, "-m", "pipelines.cli", stage, *SETTINGS, f"storage={storage}", *overrides],
                   check=True, capture_output=True)
    return json.loads((Path(storage) / "stream" / stage / "stage.json").read_text())["metrics"]


def main() -> None:
    with tempfile.TemporaryDirectory() as storage:
        for stage in ("ingest", "autoencoder", "encoder"):
            metrics(storage, stage)
        latents = metrics(storage, "latents")
        cached = metrics(storage, "train", "trainer.reader=cached")
        streamed = metrics(storage, "train", "trainer.reader=stream")
    emit("stream", streamed["images_per_second"] / cached["images_per_second"], 0.5,
         images_per_second=streamed["images_per_second"], baseline=cached["images_per_second"],
         mib=streamed["peak_rss_mb"], baseline_mib=cached["peak_rss_mb"],
         against="trainer.reader=cached, latents encoded before")
    emit("stream_whole", (latents["seconds"] + cached["seconds"]) / streamed["seconds"], 0.5,
         seconds=streamed["seconds"], baseline=round(latents["seconds"] + cached["seconds"], 1),
         against="stages latents and train with trainer.reader=cached, two epochs")


if __name__ == "__main__":
    main()
