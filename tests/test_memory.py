"""The memory of the stages that read images does not grow with their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from conftest import TINY
from scipy.ndimage import gaussian_filter

from cluster.storage import Folder
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import shard_name, write_shard
from pipelines.tables.schemas import IMAGES

SIDE, ROWS = 128, 64
STAGES = {
    "autoencoder": """
from pipelines.generator.autoencoder.stage import train_autoencoder
train_autoencoder(folder, images, settings.sections["autoencoder"], 128, 0)
""",
    "encoder": """
from pipelines.generator.encoder.stage import PROBE_IMAGES, train_encoder
PROBE_IMAGES.update(train=1_000, val=200)
train_encoder(folder, images, settings.sections["encoder"], 128, 0)
""",
    "finetune": """
from tuning.finetune.stage import train_arm
train_arm(folder, [(images, "train")], (images, "val"), (images, "test"), "a", settings.sections["finetune"], None, 0)
""",
}
SETUP = """
import json, resource, sys
import torch
from cluster.storage import Folder
from pipelines.graph.compose import load_settings
from pipelines.learning import readers
readers.DECODED_BYTES = 32 << 20
torch.set_num_threads(2)
folder, images, settings = Folder(sys.argv[1]), Folder(sys.argv[2]), load_settings(*json.loads(sys.argv[3]))
"""
PEAK = "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_memory_does_not_grow_with_the_set(stage, tmp_path):
    random = np.random.default_rng(0)
    smooth = gaussian_filter(random.normal(128, 400, (ROWS, SIDE, SIDE)), (0, 8, 8)).clip(0, 255).astype(np.uint8)
    rows = [{"image_id": f"i{k}", "image": encode_png(image), "source": "s", "labels": ["a"] if k % 2 else [],
             "absent": [] if k % 2 else ["a"],
             "split": ("train", "train", "train", "val", "test", "test")[k % 6]} for k, image in enumerate(smooth)]
    one = Folder(f"{tmp_path}/one")
    write_shard(one, 0, pa.Table.from_pylist(rows, schema=IMAGES))
    overrides = [*TINY, "autoencoder.images=64", "encoder.images=64", "finetune.images=64", f"storage={tmp_path}"]
    peaks = {}
    for shards in (100, 500):  # 105 and 524 MB decoded: both more than what is drawn and read ahead
        images = tmp_path / str(shards)
        images.mkdir()
        for index in range(shards):
            os.link(f"{one.path}/{shard_name(0)}", images / shard_name(index))
        command = [sys.executable, "-c", SETUP + STAGES[stage] + PEAK, f"{tmp_path}/{stage}-{shards}", str(images),
                   json.dumps(overrides)]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[shards] = int(out.stdout.split()[-1])
    assert peaks[500] < 1.1 * peaks[100], peaks
