"""One function run apart from the driver: on an accelerator, or in a process that costs it neither memory nor life."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.session import Resources, use_cores

T = TypeVar("T")


def compute(resources: Resources, function: Callable[..., T], *args: Any) -> T:
    """Run `function(*args)` in one Ray task on an accelerator (or the CPUs of one node) and return its result.

    Exceptions of the function are raised here as they are, so that a user's mistake keeps its type and text.
    """
    import ray
    from ray.exceptions import RayTaskError

    task = ray.remote(max_retries=1, max_calls=1, **resources.accelerator)(_with_threads)
    try:
        return ray.get(task.remote(function, args))
    except RayTaskError as error:
        raise error.cause from error


def apart(function: Callable[..., T], *args: Any) -> T:
    """Run `function(*args)` in a new process of this machine and return its result: what it held goes with it.

    Exceptions of the function are raised here as they are.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


@dataclass(frozen=True)
class IsolatedTask:
    """Runs a function in its own process; returns {} if that process dies.

    Args:
        name: `module:function`, which is imported there only.
        needs: arguments of `ray.remote`.
        arguments: of the function, beside those of the call.
    """

    name: str
    needs: dict[str, Any]
    arguments: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The function's result, or {} when its process died.  The function's own exceptions are raised."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        task = ray.remote(max_retries=0, **self.needs)(_call)
        try:
            return ray.get(task.remote(self.name, args, kwargs | self.arguments))
        except RayTaskError:
            raise
        except RayError:
            return {}


def _call(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    import importlib

    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)(*args, **kwargs)


def _with_threads(function: Callable[..., T], args: tuple) -> T:
    use_cores()
    return function(*args)
