"""The Ray cluster a command runs on: the one it was submitted to, or a small one of its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

OBJECT_STORE_BYTES = 512 << 20  # enough for the blocks in flight of a laptop run; larger data spills to disk


HIDE_GPUS = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}


@dataclass(frozen=True)
class Resources:
    """Totals of the connected cluster."""

    cpus: int
    gpus: int
    node_cpus: int  # of the largest node: the most that one process can reserve
    hides_gpus: bool = False  # the cluster has GPUs that must not be used
    fixed: bool = False  # the cluster is this machine alone and cannot grow
    accelerator_type: str | None = None  # of `gpus`, by its name in Ray; None: of any type

    @property
    def accelerator(self) -> dict[str, Any]:
        """Ray options of one computing process: one GPU if there are any, else one CPU."""
        return {"num_cpus": 1, **(self.gpu if self.gpus else self.without_gpus)}

    @property
    def gpu(self) -> dict[str, Any]:
        """Ray options of a process with one GPU."""
        return {"num_gpus": 1} | ({"accelerator_type": self.accelerator_type} if self.accelerator_type else {})

    @property
    def without_gpus(self) -> dict[str, Any]:
        """Ray options that hide the cluster's GPUs from a process: Ray shows them to one that reserved none."""
        return HIDE_GPUS if self.gpus or self.hides_gpus else {}

    def refreshed(self) -> Resources:
        """Totals now: nodes may have come or gone."""
        return replace(count_resources(), fixed=self.fixed)

    def cpus_each(self, processes: int) -> int:
        """CPUs that each of `processes` can reserve."""
        return min(max(self.cpus // processes, 1), self.node_cpus)


def gpu_bundle(accelerator_type: str | None) -> dict[str, float]:
    """One GPU, of a type if it is given, in a request to Ray's autoscaler."""
    return {"GPU": 1.0} | ({f"accelerator_type:{accelerator_type}": 0.001} if accelerator_type else {})


def count_resources(accelerator_type: str | None = None) -> Resources:
    """Totals of the nodes that are alive now; GPUs of one type only if it is given, by its name in Ray."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    typed = [node for node in nodes if accelerator_type is None or f"accelerator_type:{accelerator_type}" in node]
    return Resources(cpus=int(sum(node.get("CPU", 0) for node in nodes)) or 1,
                     gpus=int(sum(node.get("GPU", 0) for node in typed)), accelerator_type=accelerator_type,
                     node_cpus=int(max([node.get("CPU", 0) for node in nodes], default=0)))


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
            os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a report waits for a poll, else 2 s
            ray.init(
                "local",
                num_cpus=max(2, cores()),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
            )
    try:
        yield replace(count_resources(), fixed=ours and not os.environ.get("RAY_ADDRESS"))
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
