"""The Ray cluster a command runs on: the one it was submitted to, or a small one of its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

OBJECT_STORE_BYTES = 512 << 20  # enough for the blocks in flight of a laptop run; larger data spills to disk


@dataclass(frozen=True)
class Resources:
    """Totals of the connected cluster."""

    cpus: int
    gpus: int
    node_cpus: int  # of the largest node: the most that one process can reserve

    @property
    def accelerator(self) -> dict[str, float]:
        """Ray resources of one computing process: one GPU if the cluster has any, else one CPU."""
        return {"num_gpus": 1, "num_cpus": 1} if self.gpus else {"num_cpus": 1}

    def cpus_each(self, processes: int) -> int:
        """CPUs that each of `processes` can reserve."""
        return min(max(self.cpus // processes, 1), self.node_cpus)


@contextlib.contextmanager
def session() -> Iterator[Resources]:
    """Connect to the cluster named by RAY_ADDRESS, or start one on this machine and stop it at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_task_oom_retries", "3")  # out of memory; no limit by default
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", log_to_driver=False, logging_level="warning")
        else:
            ray.init(
                "local",
                num_cpus=max(2, cores()),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
            )
    try:
        total = ray.cluster_resources()
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        yield Resources(cpus=int(total.get("CPU", 1)), gpus=int(total.get("GPU", 0)), node_cpus=int(largest))
    finally:
        if ours:
            ray.shutdown()


def use_cores(count: int | None = None) -> None:
    """Set torch's threads to `count`, or to all cores of this node: Ray limits a worker to the CPUs it reserved."""
    import torch

    torch.set_num_threads(cores() if count is None else count)


def cores() -> int:
    """CPUs that this process may use: those of its affinity, and of its container's quota (cgroup v2)."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return mine if quota == "max" else max(1, min(mine, int(quota) // int(period)))
    except OSError:
        return mine


def device() -> str:
    """The torch device of this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
