"""Elastic training leaves what is reserved."""

from __future__ import annotations

import time

import pytest

from cluster import reservation
from cluster.reservation import reserved

pytestmark = pytest.mark.ray


def cpus_for_training(workers: int) -> float:
    """What Ray's coordinator promises to a Ray Train run of so many workers with one CPU each."""
    import ray
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    request = coordinator.request_resources.remote("training", [{"CPU": 1}] * workers, 60,
                                                   priority=ResourceRequestPriority.HIGH)
    ray.get(request)
    promised = ray.get(coordinator.get_reserved_resources.remote("training"))
    ray.get(coordinator.cancel_request.remote("training"))
    return sum(node.get("CPU", 0) for node in promised.values())


def test_training_gets_all_but_what_is_reserved(ray_cluster):
    assert cpus_for_training(4) == 4
    with reserved("validation", {"CPU": 1}, lambda: True):
        assert cpus_for_training(4) == 3
    assert cpus_for_training(4) == 4


def test_nothing_is_kept_from_training_that_has_no_more_than_it_needs(ray_cluster, monkeypatch):
    """Nodes are lost, and come back: the request is first again then, although training's was made meanwhile."""
    monkeypatch.setattr(reservation, "RENEWED", 0.1)
    spare = [True]
    with reserved("validation", {"CPU": 1}, lambda: spare[0]):
        for has_spare, left in ((False, 4), (True, 3)):
            spare[0] = has_spare
            time.sleep(1)
            assert cpus_for_training(4) == left
