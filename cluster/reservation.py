"""Room that elastic training leaves to other tasks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

EXPIRES, RENEWED, TIMEOUT = 180.0, 20.0, 30.0  # seconds


@contextlib.contextmanager
def reserved(name: str, resources: dict[str, float], spare: Callable[[], bool]) -> Iterator[None]:
    """Keep `resources` from the elastic workers of a Ray Train run that starts within the block, while `spare()`.

    Ray Train grows to all that the cluster has, unless Ray's coordinator of requests has promised some of it to others.
    Requests of equal priority are served in the order of their arrival. The autoscaler starts a node for them, too.

    Args:
        name: of the request, one per run.
        spare: whether the cluster has more than the workers need; asked every RENEWED seconds.
    """
    import ray
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.exceptions import RayError

    coordinator, ended = get_or_create_autoscaling_coordinator(), threading.Event()

    def request() -> None:
        bundles = [resources] if spare() else []  # an empty request keeps its place before later ones
        ray.get(coordinator.request_resources.remote(name, bundles, EXPIRES, priority=ResourceRequestPriority.HIGH),
                timeout=TIMEOUT)

    def renew() -> None:
        while not ended.wait(RENEWED):
            with contextlib.suppress(RayError):  # renewed again before it expires
                request()

    request()
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        coordinator.cancel_request.remote(name)  # not waited for: it would hide why the block was left
