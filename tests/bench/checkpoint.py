"""How long a checkpoint of the demo's model keeps Ray Train's workers waiting, against writing it on the spot."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from report import emit
from table import training_spec

from cluster.session import session
from cluster.storage import Folder
from pipelines.generator.training import checkpoint
from pipelines.generator.training.ray_train import run_trainer
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.monitor.journal import read_journal

LATENT, WIDTH, ROWS, GOAL = (4, 16, 16), 128, 512, 0.1  # seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as staging_dir, session() as resources:
        settings = load_settings("profile=demo", f"storage={staging_dir}", "name=bench", "trainer.images=1536",
                                 "trainer.batch=32", "trainer.checkpoint_every=256", "trainer.checkpoint_seconds=0",
                                 "trainer.log_every=32", "validate.images=0")
        last = run_trainer(training_spec(Folder(staging_dir) / "bench", settings, ROWS, LATENT, WIDTH),
                           Plan(settings).stage("train", resources))
        entries = read_journal(Folder(staging_dir) / "bench" / "train")
        stalls = [entry["checkpoint_stall_seconds"] for entry in entries if entry["checkpoint_stall_seconds"]]
        state, cursor = checkpoint.load(Path(last.path), "bench")
        start = time.perf_counter()
        checkpoint.save(Path(staging_dir) / "aside", state, cursor)
        (Folder(staging_dir) / "again").upload(Path(staging_dir) / "aside")
        written = time.perf_counter() - start
    stall = statistics.median(stalls)
    emit("checkpoint", GOAL / stall, 1.0, seconds=round(stall, 4), longest=round(max(stalls), 4), n=len(stalls),
         synchronous=round(stall + written, 4), against=f"{GOAL} s")


if __name__ == "__main__":
    main()
