"""A cluster whose nodes come and go under a training."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
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


def drain(cluster, node) -> None:
    """Announce that a node will be preempted."""
    subprocess.run([Path(sys.executable).parent / "ray", "drain-node", "--address", cluster.address, "--node-id",
                    node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
                    "--deadline-remaining-seconds", "120"], check=True)


@pytest.fixture
def encoded(tmp_path):
    """Storage of a run that has all that training needs."""
    for stage in ("ingest", "autoencoder", "encoder", "latents"):
        run(tmp_path, stage=stage)
    return tmp_path


@contextlib.contextmanager
def cluster_of(head_cpus: int):
    """A cluster with one node beside its head, that node, and a function that starts a command there."""
    from ray.cluster_utils import Cluster

    cluster, started = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus}), []

    def start(arguments: list[str]) -> subprocess.Popen:
        started.append(subprocess.Popen(arguments, env=os.environ | {"RAY_ADDRESS": cluster.address}))
        return started[-1]

    try:
        yield cluster, cluster.add_node(num_cpus=1), start
    finally:
        for process in started:
            process.kill()
        cluster.shutdown()


def test_a_node_with_notice_is_left_with_a_checkpoint_and_a_new_one_is_taken(encoded):
    train = Folder(str(encoded / "run" / "train"))

    def workers() -> int:
        return int([0, *(entry["workers"] for entry in read_journal(train))][-1])

    with cluster_of(head_cpus=1) as (cluster, node, start):
        training = command(encoded, "trainer.workers=2", "trainer.min_workers=1", "trainer.images=90000",
                           f"trainer.checkpoint_every={EVERY}", "trainer.keep_checkpoints=5", stage="train")
        process = start(training)
        wait_for(lambda: workers() == 2, process)
        assert checkpoint.latest_complete(train / "checkpoints") is None
        drain(cluster, node)
        wait_for(lambda: unscheduled(train), process)
        [kept] = unscheduled(train)
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: workers() == 1, process)
        cluster.add_node(num_cpus=1)
        wait_for(lambda: workers() == 2, process)
        assert process.wait(600) == 0
    entries = read_journal(train)
    seen = [entry["images"] for entry in entries]
    assert seen == sorted(set(seen))
    assert seen[-1] == 90_000
    alone = [entry["images"] for entry in entries if entry["workers"] == 1]
    assert alone[0] > kept  # nothing that it holds was learnt again


def kill_worker() -> bool:
    """SIGKILL a training worker, without notice.  Returns whether there was one."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::RayTrainWorker" in " ".join(child.cmdline()):
                child.kill()
                return True
    return False


def test_ten_failures_with_and_without_notice_change_nothing(encoded, monkeypatch):
    """Kills of the worker, and nodes that are announced to go and that another one replaces, in turn."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of both runs: their number decides the order of sums
    shutil.copytree(encoded / "run", encoded / "calm" / "run")
    options = ("trainer.images=96000", "trainer.checkpoint_every=2000")
    run(encoded / "calm", *options, stage="train")
    train = Folder(str(encoded / "run" / "train"))

    def seen() -> int:
        latest = checkpoint.latest_complete(train / "checkpoints")
        return checkpoint.images_seen(latest) if latest else 0

    with cluster_of(head_cpus=0) as (cluster, node, start):
        process = start(command(encoded, *options, stage="train"))
        for failure in range(10):
            before = seen()
            wait_for(lambda before=before: seen() > before, process)
            if failure % 2:
                assert kill_worker()
            else:
                drain(cluster, node)
                following = cluster.add_node(num_cpus=1)
                cluster.remove_node(node, allow_graceful=False)
                node = following
        assert seen() < 96_000, "training was over before the last failure"
        assert process.wait(900) == 0
    images = [entry["images"] for entry in read_journal(train)]
    assert images == sorted(set(images))
    assert len(checkpoint.list_checkpoints(train / "checkpoints")) == 2, "what the failures left is removed"
    disturbed, calm = (load_file(storage / "run/train/generator/unet/diffusion_pytorch_model.safetensors")
                       for storage in (encoded, encoded / "calm"))
    assert all(np.array_equal(disturbed[name], value) for name, value in calm.items())


def test_a_node_that_never_comes_back_is_done_without(encoded):
    train = Folder(str(encoded / "run" / "train"))
    with cluster_of(head_cpus=1) as (cluster, node, start):
        process = start(command(encoded, "trainer.workers=2", "trainer.min_workers=1", "trainer.images=60000",
                                f"trainer.checkpoint_every={EVERY}", stage="train"))
        wait_for(lambda: any(entry["workers"] == 2 for entry in read_journal(train)), process)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(600) == 0
    assert read_journal(train)[-1]["workers"] == 1
    assert read_journal(train)[-1]["images"] == 60_000


def test_a_validation_that_hangs_is_ended_and_training_goes_on(encoded):
    told = run(encoded, "validate.images=16", "validate.steps=900", "validate.sample_images=16",
               "validate.frechet_images=16", "validate.max_seconds=3", stage="train")
    assert "the last checkpoint could not be validated" in told
    snapshot = (encoded / "run/train/checkpoints" / SNAPSHOT).read_text()
    timed_out = json.loads(snapshot)["timed_out_validation_checkpoint_dir_names"]
    assert checkpoint.directory_name(1_024) in timed_out
    assert read_journal(Folder(str(encoded / "run" / "train")))[-1]["images"] == 1_024
    assert (encoded / "run/train/generator/model_index.json").exists()
