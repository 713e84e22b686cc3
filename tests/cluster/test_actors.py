"""A pool of actors outlives its members, and gives up on what kills them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from cluster.actors import MAX_ATTEMPTS, ActorPool
from cluster.errors import UserError

pytestmark = pytest.mark.ray


class Doubler:
    """Doubles numbers.  A number in `fatal` kills the process, each time or the first time only; -1 is refused."""

    def __init__(self, folder: Path, fatal: dict[int, bool]) -> None:
        self.folder, self.fatal = folder, fatal

    def ready(self) -> None:
        pass

    def run(self, item: int) -> int:
        if item == -1:
            raise UserError("no number")
        with open(self.folder / str(item), "a") as file:
            file.write("x")
        if item in self.fatal and (self.fatal[item] or (self.folder / str(item)).stat().st_size == 1):
            os._exit(1)
        return 2 * item


class Avalanche(Doubler):
    """The first to run 5 takes all others with it, as a node does."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        (self.folder / "pids").mkdir(exist_ok=True)
        (self.folder / "pids" / str(os.getpid())).touch()

    def run(self, item: int) -> int:
        if item == 5 and not (self.folder / "fallen").exists():
            while len(pids := list((self.folder / "pids").iterdir())) < 4:
                time.sleep(0.05)
            time.sleep(1)  # the others are idle now
            (self.folder / "fallen").touch()
            for pid in sorted(pids, key=lambda file: file.name == str(os.getpid())):
                os.kill(int(pid.name), signal.SIGKILL)
        return 2 * item


class StillBorn(Doubler):
    def ready(self) -> None:
        os._exit(1)


def pool(folder: Path, kind: type = Doubler, count: int = 2, fatal: dict[int, bool] | None = None,
         startable: int | None = None) -> tuple[ActorPool, list[str]]:
    """A pool of which only the first `startable` actors find room, and its messages."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    made, messages = [], []

    def make_actor():
        made.append(None)
        cpus = 0 if startable is None or len(made) <= startable else 10_000
        return ray.remote(max_restarts=0, num_cpus=cpus)(kind).remote(folder, fatal or {})

    return ActorPool(make_actor, count, messages.append), messages


def test_every_item_is_run_once(ray_cluster, tmp_path):
    actors, messages = pool(tmp_path, count=3)
    first, *results = actors.run(range(20))
    assert first is None
    assert sorted(results) == [(k, 2 * k) for k in range(20)]
    assert {len(file.read_text()) for file in tmp_path.iterdir()} == {1}
    assert not messages


def test_an_item_whose_actor_died_is_taken_by_one_that_lives(ray_cluster, tmp_path):
    actors, messages = pool(tmp_path, fatal={3: False}, startable=2)
    assert sorted(result for result in actors.run(range(8)) if result) == [(k, 2 * k) for k in range(8)]
    assert len(messages) == 1


def test_idle_actors_that_died_with_a_busy_one_do_not_count_against_its_item(ray_cluster, tmp_path):
    actors, messages = pool(tmp_path, Avalanche, count=4)
    assert sorted(result for result in actors.run(range(6)) if result) == [(k, 2 * k) for k in range(6)]
    assert len(messages) == 1


@pytest.mark.timeout(180)
def test_actors_that_all_died_and_are_not_replaced_end_the_run(ray_cluster, tmp_path):
    import ray

    kinds = iter([Avalanche] * 4)
    actors, _ = pool(tmp_path, count=4)
    actors.make_actor = lambda: ray.remote(max_restarts=0, num_cpus=0)(next(kinds, StillBorn)).remote(tmp_path, {})
    with pytest.raises(RuntimeError, match="started"):
        list(actors.run(range(6)))


def test_an_item_that_kills_every_actor_ends_the_run(ray_cluster, tmp_path):
    actors, _ = pool(tmp_path, fatal={3: True})
    with pytest.raises(RuntimeError, match="shard 3"):
        list(actors.run(range(8)))
    assert len((tmp_path / "3").read_text()) == MAX_ATTEMPTS


def test_actors_that_never_start_end_the_run(ray_cluster, tmp_path):
    with pytest.raises(RuntimeError, match="started"):
        list(pool(tmp_path, StillBorn)[0].run(range(8)))


def test_actors_that_never_start_leave_the_work_to_those_that_did(ray_cluster, tmp_path):
    import ray

    kinds = iter([Doubler])
    actors, messages = pool(tmp_path)
    actors.make_actor = lambda: ray.remote(max_restarts=0, num_cpus=0)(next(kinds, StillBorn)).remote(tmp_path, {})
    assert sorted(result for result in actors.run(range(200)) if result) == [(k, 2 * k) for k in range(200)]
    assert len(messages) <= 1


def test_an_exception_of_the_actors_own_code_keeps_its_type(ray_cluster, tmp_path):
    with pytest.raises(UserError, match="no number"):
        list(pool(tmp_path)[0].run([1, -1]))
