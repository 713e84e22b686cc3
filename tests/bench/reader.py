"""The training reader alone: latents/s of one core, and the time to the first batch of a large table."""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pyarrow as pa
import torch
from report import emit

from cluster.storage import Folder
from pipelines.data.records import latents_schema
from pipelines.data.tables import write_shard
from pipelines.generator.reader import Reader

ROWS, SHARD, LATENT, WIDTH, BATCH, STEPS = 200_000, 2_000, (4, 16, 16), 128, 128, 400
LATENTS_A_SECOND, FIRST_BATCH_SECONDS = 5_000, 3.0  # the goals


def make_table(folder: Folder) -> None:
    rng, schema = np.random.default_rng(0), latents_schema(LATENT, WIDTH)
    for shard in range(ROWS // SHARD):
        shapes = {"latent_mean": LATENT, "latent_logvar": LATENT, "embedding": (WIDTH,)}
        values = {name: rng.standard_normal((SHARD, *shape)).astype(np.float16) for name, shape in shapes.items()}
        arrays = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(value) for name, value in values.items()}
        told = {"image_id": [f"{shard}-{k}" for k in range(SHARD)], "patient_id": ["p"] * SHARD,
                "labels": [["opacity"] if k % 3 else [] for k in range(SHARD)], "split": ["train"] * SHARD}
        write_shard(folder, shard, pa.table({name: (arrays | told)[name] for name in schema.names}, schema=schema))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as aside:
        folder = Folder(aside)
        make_table(folder)
        start = time.perf_counter()
        batches = Reader(folder, 0).batches(BATCH * (STEPS + 1), BATCH, 0, 0, 1, "cpu")
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
