"""Run a function on several processes joined by gloo, as tests of the engine need it."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from typing import Any


def _child(rank: int, world: int, port: int, function: Callable, arguments: tuple, results: Any) -> None:
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        results.put((rank, function(rank, world, *arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


def start(world: int, function: Callable, *arguments: Any) -> tuple[list[Any], Any]:
    """`world` processes that run `function(rank, world, *arguments)`, and the queue of their results."""
    context = multiprocessing.get_context("forkserver")  # which imports once what every process needs
    context.set_forkserver_preload(["pipelines.generator.training.loop"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    children = [context.Process(target=_child, args=(rank, world, port, function, arguments, results), daemon=True)
                for rank in range(world)]
    for child in children:
        child.start()
    return children, results


def run(world: int, function: Callable, *arguments: Any, timeout: float = 240) -> list[Any]:
    """What `function(rank, world, *arguments)` returns on each of `world` processes, by rank."""
    children, results = start(world, function, *arguments)
    found = [results.get(timeout=timeout) for _ in children]
    for child in children:
        child.join(timeout=30)
        child.kill()
    errors = [error for _, _, error in found if error]
    assert not errors, errors[0]
    return [value for _, value, _ in sorted(found, key=lambda item: item[0])]
