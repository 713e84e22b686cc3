"""A cluster whose nodes come and go under a training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import command, run

from cluster.storage import Folder
from pipelines.generator.training import checkpoint
from pipelines.generator.training.ray_train import SNAPSHOT
from pipelines.monitor.journal import read_journal

EVERY = 4_000  # images between checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "training was over before it came to this"
        assert time.monotonic() < deadline
        time.sleep(0.2)


def unscheduled(train: Folder) -> list[int]:
    """Images at the checkpoints that Ray knows and that were not due: a batch of 32 crosses no multiple of EVERY there.
    """
    known = set(re.findall(checkpoint.PREFIX + r"(\d+)", json.dumps((train / "checkpoints").read_json(SNAPSHOT))))
    return [images for images in sorted(map(int, known)) if images % EVERY >= 32]


def test_a_node_with_notice_is_left_with_a_checkpoint_and_a_new_one_is_taken(tmp_path):
    from ray.cluster_utils import Cluster

    train = Folder(str(tmp_path / "run" / "train"))
    for stage in ("ingest", "autoencoder", "encoder", "latents"):
        run(tmp_path, stage=stage)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    process = None

    def workers() -> int:
        return int([0, *(entry["workers"] for entry in read_journal(train))][-1])

    try:
        node = cluster.add_node(num_cpus=1)
        training = command(tmp_path, "trainer.workers=2", "trainer.min_workers=1", "trainer.images=90000",
                           f"trainer.checkpoint_every={EVERY}", "trainer.keep_checkpoints=5", stage="train")
        process = subprocess.Popen(training, env=os.environ | {"RAY_ADDRESS": cluster.address})
        wait_for(lambda: workers() == 2, process)
        assert checkpoint.latest_complete(train / "checkpoints") is None
        subprocess.run([Path(sys.executable).parent / "ray", "drain-node", "--address", cluster.address, "--node-id",
                        node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
                        "--deadline-remaining-seconds", "120"], check=True)
        wait_for(lambda: unscheduled(train), process)
        [kept] = unscheduled(train)
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: workers() == 1, process)
        cluster.add_node(num_cpus=1)
        wait_for(lambda: workers() == 2, process)
        assert process.wait(600) == 0
    finally:
        if process and process.poll() is None:
            process.kill()
        cluster.shutdown()
    entries = read_journal(train)
    seen = [entry["images"] for entry in entries]
    assert seen == sorted(set(seen))
    assert seen[-1] == 90_000
    alone = [entry["images"] for entry in entries if entry["workers"] == 1]
    assert alone[0] > kept  # nothing that it holds was learnt again
