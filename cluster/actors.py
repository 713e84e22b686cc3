"""A pool of Ray actors that outlives its members."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_ATTEMPTS = 3  # deaths on one item, or of actors in a row while they start; preemptions do not count
PATIENCE = 60.0  # seconds between messages while no actor runs


class ActorPool:
    """Runs `actor.run(item)` for every item on a number of actors, and replaces those that die.

    An item whose actor died goes to the next actor that is free, and not to the replacement, which may have no node to
    start on. Actors that were idle then must answer before they get it, as they may have been on the same node. An
    actor may die after it has finished an item: running an item twice must be harmless.

    Args:
        make_actor: starts an actor with the methods `ready()` and `run(item)`.
        count: of actors, at most.
        warn: takes the text of a message for the user.
    """

    def __init__(self, make_actor: Callable[[], Any], count: int, warn: Callable[[str], None]) -> None:
        self.make_actor, self.count, self.warn = make_actor, count, warn
        self._starting: dict[Any, Any] = {}  # actors by the reference of their `ready`
        self._idle: list[Any] = []
        self._asked: dict[Any, Any] = {}  # idle actors, asked whether they live, by the reference of their `ready`
        self._busy: dict[Any, tuple[Any, int]] = {}  # actor and item by the reference of its `run`
        self._failed_starts = 0
        self._attempts = Counter[int]()

    def run(self, items: Sequence[int]) -> Iterator[tuple[int, Any] | None]:
        """Yields None once, when the first actor is ready, then (item, result) in the order of completion.

        Raises:
            RuntimeError: MAX_ATTEMPTS actors died on one item, or while they started.
            Exception: what an actor's own code raised.
        """
        import ray

        queue, was_ready, since = deque(items), False, time.monotonic()
        for _ in range(min(self.count, len(queue))):
            self._start()
        while queue or self._busy:
            finished, _ = ray.wait([*self._busy, *self._starting, *self._asked], num_returns=1, timeout=PATIENCE)
            if self._busy or finished:
                since = time.monotonic()
            else:
                self.warn(f"waiting for an actor to start for {time.monotonic() - since:.0f} s")
            for reference in finished:
                if reference in self._starting:
                    self._started(reference)
                elif reference in self._asked:
                    self._answered(reference)
                elif (done := self._finished(reference, queue)) is not None:
                    yield done
            if self._idle and not was_ready:
                was_ready = True
                yield None
            while queue and self._idle:
                actor, item = self._idle.pop(), queue.popleft()
                self._busy[actor.run.remote(item)] = (actor, item)

    def _start(self) -> None:
        actor = self.make_actor()
        self._starting[actor.ready.remote()] = actor

    def _started(self, reference: Any) -> None:
        """The actor is idle, or has died and is replaced."""
        actor = self._starting.pop(reference)
        try:
            _result(reference)
        except _Death as death:
            self._failed_starts += not death.preempted
            if self._failed_starts < MAX_ATTEMPTS:
                self._start()
            elif self._busy or self._idle or self._asked or self._starting:
                self.warn(f"{MAX_ATTEMPTS} actors died while they started ({death}); going on with fewer")
            else:
                raise RuntimeError(f"{MAX_ATTEMPTS} actors died while they started; the last error: {death}") from death
        else:
            self._failed_starts = 0
            self._idle.append(actor)

    def _finished(self, reference: Any, queue: deque[int]) -> tuple[int, Any] | None:
        """The item and its result, or None if the actor died: the item is first in the queue then."""
        import ray

        actor, item = self._busy.pop(reference)
        try:
            result = _result(reference)
        except _Death as death:
            self._attempts[item] += not death.preempted
            if self._attempts[item] == MAX_ATTEMPTS:
                raise RuntimeError(f"{MAX_ATTEMPTS} actors died on shard {item}; the last error: {death}") from death
            self.warn(f"an actor died ({death}); shard {item} is run again")
            queue.appendleft(item)
            ray.kill(actor)  # unreachable is not dead
            self._start()
            self._asked |= {idle.ready.remote(): idle for idle in self._idle}
            self._idle.clear()
            return None
        self._idle.append(actor)
        return item, result

    def _answered(self, reference: Any) -> None:
        """The actor is idle again, or has died, and is replaced if no other is left: there was no work for it."""
        actor = self._asked.pop(reference)
        try:
            _result(reference)
        except _Death:
            if not (self._busy or self._idle or self._asked or self._starting):
                self._start()
        else:
            self._idle.append(actor)


class _Death(Exception):
    """An actor was lost, with its process, its node or its result."""

    preempted = False


def _result(reference: Any) -> Any:
    """Raises _Death for a fault of the cluster; an exception of the actor's own code as it is."""
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        death = _Death(f"{type(error).__name__}: {str(error).strip().splitlines()[-1].strip()}")
        death.preempted = isinstance(error, RayActorError) and error.preempted
        raise death from error
