"""Run one function outside the driver: on an accelerator, or in a process whose memory and crashes are its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import UserError
from cluster.session import Resources, use_cores

T = TypeVar("T")


def run_on_accelerator(resources: Resources, function: Callable[..., T], *args: Any) -> T:
    """Run `function(*args)` in one Ray task on an accelerator (or the CPUs of one node) and return its result.

    Without GPUs the process stays, with what it has imported, for the next task. Exceptions of the function are raised
    here as they are, so that a UserError keeps its type and text.
    """
    import ray
    from ray.exceptions import RayTaskError

    task = ray.remote(max_retries=1, **_options(resources))(_with_threads)
    try:
        return ray.get(task.remote(function, args))
    except RayTaskError as error:
        raise error.cause from error


def run_each_on_accelerator(resources: Resources, function: Callable[..., T], items: Sequence[Any],
                            max_seconds: float) -> Iterator[tuple[Any, T | Exception]]:
    """Run `function(item)` for each item in a Ray task of its own, at once on as many accelerators as there are.

    Without GPUs a task takes the CPUs of one node.

    Args:
        max_seconds: after this time without a completed task those that are left are ended.

    Yields:
        Each item with its result, or with the exception that the function raised or its task ended with, in the order
        of completion.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    options = _options(resources) | ({} if resources.gpus else {"num_cpus": resources.node_cpus})
    run = ray.remote(max_retries=3, **options)(_with_threads)
    pending = {run.remote(function, (item,)): item for item in items}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=max_seconds)
        if not done:
            for task, item in pending.items():
                ray.cancel(task, force=True)
                yield item, TimeoutError(f"not done after {max_seconds:g} s")
            return
        [finished] = done
        item = pending.pop(finished)
        try:
            yield item, ray.get(finished)
        except RayTaskError as error:
            yield item, error.cause
        except RayError as error:
            yield item, error


def run_in_subprocess(function: Callable[..., T], *args: Any) -> T:
    """Run `function(*args)` in a new process of this machine, whose memory is freed at its end, and return its result.

    The process imports the module of the function, not the caller's script, which may lack a `__main__` guard.
    Exceptions of the function are re-raised here.

    Raises:
        RuntimeError: the process was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        ended = subprocess.run([sys.executable, "-P", "-c", "from cluster.tasks import _answer; _answer()", result],
                               input=pickle.dumps((function, args)), check=False,
                               env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        if not result.exists():
            raise RuntimeError(f"{function.__module__}.{function.__qualname__} was killed (exit code "
                               f"{ended.returncode}), most often because the machine ran out of memory")
        value, error = pickle.loads(result.read_bytes())  # noqa: S301
    if error:
        raise error
    return value


def _answer() -> None:
    """Entry point of the subprocess: the call arrives pickled on stdin, the result goes to the file named by argv."""
    function, args = pickle.load(sys.stdin.buffer)  # noqa: S301
    value, error = None, None
    try:
        value = function(*args)
    except Exception as raised:
        error = raised
        if not isinstance(error, UserError):
            error.add_note("".join(traceback.format_exception(error)))
    Path(sys.argv[1]).write_bytes(pickle.dumps((value, error)))


@dataclass(frozen=True)
class IsolatedTask:
    """Runs a function in its own process; returns {} if that process dies.

    Args:
        name: `module:function`, imported only in that process.
        needs: arguments of `ray.remote`.
        arguments: of the function by name, in addition to those of the call; pickled, so that what they are made of is
            imported only in that process.
    """

    name: str
    needs: dict[str, Any]
    arguments: bytes

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The function's result, or {} when its process died.  The function's own exceptions are raised."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        task = ray.remote(max_retries=0, **self.needs)(_call)
        try:
            return ray.get(task.remote(self.name, args, kwargs, self.arguments))
        except RayTaskError:
            raise
        except RayError:
            return {}


def _call(name: str, args: tuple, kwargs: dict[str, Any], arguments: bytes) -> Any:
    import importlib

    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)(*args, **kwargs, **pickle.loads(arguments))  # noqa: S301


def _options(resources: Resources) -> dict[str, Any]:
    """Ray options of a task: a process that has used a GPU ends with it, which frees the GPU's memory."""
    return resources.accelerator | {"max_calls": 1 if resources.gpus else 0}


def _with_threads(function: Callable[..., T], args: tuple) -> T:
    import torch

    before = torch.get_num_threads()
    use_cores()
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)
