"""Room that elastic training leaves to other tasks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

EXPIRES, RENEWED = 180.0, 20.0  # seconds, as of Ray Train's own requests


@contextlib.contextmanager
def reserved(name: str, resources: dict[str, float]) -> Iterator[None]:
    """Keep `resources` from the elastic workers of a Ray Train run that starts within the block.

    Ray Train grows to all that the cluster has, unless Ray's coordinator of requests has promised some of it to others.
    Requests of equal priority are served in the order of their arrival. The autoscaler starts a node for them, too.

    Args:
        name: of the request, one per run.
    """
    requested, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=_renew, args=(name, resources, requested, ended), daemon=True)
    thread.start()
    requested.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _renew(name: str, resources: dict[str, float], requested: threading.Event, ended: threading.Event) -> None:
    """Request until `ended`; in one thread, as Ray's client is not thread-safe."""
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator

    coordinator = DefaultAutoscalingCoordinator(name)
    while not ended.is_set():
        coordinator.request_resources([resources], EXPIRES, priority=ResourceRequestPriority.HIGH)
        requested.set()
        ended.wait(RENEWED)
    coordinator.cancel_request()
