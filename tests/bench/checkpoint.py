"""How long a checkpoint keeps the workers waiting: at the demo's size under Ray Train, and its law with the size.

The step waits for a copy of the worker's own part of the state into memory; files are written in the background.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time

import numpy as np
import torch
from report import emit
from table import training_spec
from torch import nn

from cluster.session import session
from cluster.storage import Folder
from pipelines.generator.training import checkpoint
from pipelines.generator.training.checkpoint import Cursor
from pipelines.generator.training.deepspeed import DeepSpeedTrainer
from pipelines.generator.training.ray_train import run_trainer
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.monitor.journal import read_journal

LATENT, WIDTH, ROWS, GOAL = (4, 16, 16), 128, 512, 0.1  # seconds
SIZES, ROUNDS = (3_000_000, 30_000_000, 100_000_000, 250_000_000), 5  # parameters; the largest takes 12 GB here
LARGE, WORKERS, LARGE_GOAL = 862_000_000, 8, 0.5  # Stable Diffusion's UNet on one node; seconds


class Weights(nn.Module):
    """So many parameters, in tensors of a UNet's usual size."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.zeros(1_000, 1_000) for _ in range(count // 1_000_000))


def demo_stalls() -> list[float]:
    """Seconds that each checkpoint of the demo's model stalls its worker."""
    with tempfile.TemporaryDirectory() as staging_dir, session() as resources:
        settings = load_settings("profile=demo", f"storage={staging_dir}", "name=bench", "trainer.images=1536",
                                 "trainer.batch=32", "trainer.checkpoint_every=256", "trainer.checkpoint_seconds=0",
                                 "trainer.log_every=32", "trainer.ema_snapshots=1", "validate.images=0")
        run_trainer(training_spec(Folder(staging_dir) / "bench", settings, ROWS, LATENT, WIDTH),
                    Plan(settings).stage("train", resources))
        entries = read_journal(Folder(staging_dir) / "bench" / "train")
    return [entry["checkpoint_stall_seconds"] for entry in entries if entry["checkpoint_stall_seconds"]]


def copy_and_write(count: int) -> tuple[float, float]:
    """Seconds to copy the state of `count` parameters, and to write it."""
    engine = DeepSpeedTrainer(Weights(count), load_settings("profile=demo").trainer, 1)
    layout, copies = engine.layout(), []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        vectors = engine.snapshot()
        copies.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as staging_dir:
        start = time.perf_counter()
        checkpoint.write_vectors(Folder(staging_dir), layout, 0, vectors)
        checkpoint.write_state(Folder(staging_dir), layout, Cursor(0, 0, ""))
        written = time.perf_counter() - start
    return statistics.median(copies[1:]), written


def main() -> None:
    stalls = demo_stalls()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29578", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    measured = {size: copy_and_write(size) for size in SIZES}
    torch.distributed.destroy_process_group()
    stall = statistics.median(stalls)
    emit("checkpoint", GOAL / stall, 1.0, seconds=round(stall, 4), longest=round(max(stalls), 4), n=len(stalls),
         against=f"{GOAL} s")
    seconds = [copied for copied, _ in measured.values()]
    slope, offset = np.polyfit(SIZES, seconds, 1).tolist()
    vectors = 5  # weights, two moments, two EMAs
    predicted = offset + slope * LARGE / WORKERS
    emit("checkpoint_large", LARGE_GOAL / predicted, 1.0, predicted_seconds=round(predicted, 3),
         parameters=LARGE, workers=WORKERS, gigabytes_per_second=round(4 * vectors / slope / 1e9, 2),
         copies={size: round(copied, 4) for size, (copied, _) in measured.items()},
         writes={size: round(written, 3) for size, (_, written) in measured.items()}, against=f"{LARGE_GOAL} s")


if __name__ == "__main__":
    main()
