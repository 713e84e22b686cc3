"""The training reader alone: latents/s of one core, and the time to the first batch of a large table."""

from __future__ import annotations

import tempfile
import time

import torch
from report import emit
from table import make_latents

from cluster.storage import Folder
from pipelines.generator.latents.dataset import CachedReader
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.generator.settings import CONDITIONS

ROWS, SHARD, LATENT, WIDTH, BATCH, STEPS = 200_000, 2_000, (4, 16, 16), 128, 128, 400
LATENTS_A_SECOND, FIRST_BATCH_SECONDS = 5_000, 3.0  # the goals


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as staging_dir:
        folder = Folder(staging_dir)
        make_latents(folder, ROWS, SHARD, LATENT, WIDTH)
        start = time.perf_counter()
        reader = CachedReader(folder, read_latent_spec(folder), 0, CONDITIONS)
        batches = reader.batches(BATCH * (STEPS + 1), BATCH, 0, 0, 1, "cpu")
        next(batches)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in batches:
            pass
        rate = BATCH * STEPS / (time.perf_counter() - start)
    emit("reader", rate / LATENTS_A_SECOND, 1.0, latents_per_second=round(rate), against="5,000 latents/s of one core")
    emit("reader_first_batch", FIRST_BATCH_SECONDS / first, 1.0, seconds=round(first, 2), rows=ROWS, against="3 s")


if __name__ == "__main__":
    main()
