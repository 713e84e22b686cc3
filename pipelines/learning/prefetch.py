"""Runs a generator in its own thread, a few items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

AHEAD = 2  # items prepared in advance


class Prefetcher(Generic[T]):
    """Iterates over items prepared in a thread; `waited` is the time in seconds that the consumer has waited."""

    def __init__(self) -> None:
        self.waited = 0.0

    def iterate(self, items: Callable[[], Iterable[T]]) -> Iterator[T]:
        """Yield what `items` yields in the thread; an exception there is raised here."""
        ready: queue.Queue[T | BaseException | None] = queue.Queue(AHEAD)
        stop = threading.Event()
        index = torch.cuda.current_device() if torch.cuda.is_available() else None  # a new thread starts with device 0

        def put(item: T | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.5)
                except queue.Full:
                    continue

        def prepare() -> None:
            try:
                if index is not None:
                    torch.cuda.set_device(index)
                for item in items():
                    put(item)
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:
                put(error)

        threading.Thread(target=prepare, daemon=True).start()
        try:
            while True:
                start = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - start
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
