"""Shards through an operator on real workers: what dies, fails or is mistaken on the way loses nothing else."""

from __future__ import annotations

import pytest

from cluster.errors import UserError
from cluster.faults import StorageUnavailable
from pipelines.tables import shards
from pipelines.tables.streaming import shard_numbers

ROWS = 6

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Shown:
    """In the place of a progress bar."""

    n = 0

    def add(self, rows: int) -> None:
        self.n += rows


def operator(folder, meet):
    """One that writes the rows of a shard as lines of a file, after `meet` met each of them in its worker."""
    class Lines(shards.RowOperator):
        def rows(self, shard):
            return [{"place": f"{shard}-{k}"} for k in range(ROWS)]

        def one(self, row):
            meet(row["place"])
            return row

        def killed(self, row):
            return row | {"killed": True}

        def commit(self, shard, rows):
            lines = [f"{row['place']}{' killed' if 'killed' in row else ''}" for row in rows]
            (folder / f"{shard}.txt").write_text("\n".join(lines))
            return len(rows), sum("killed" in row for row in rows)

    return Lines()


def committed(folder) -> list[str]:
    return [line for file in sorted(folder.glob("*.txt")) for line in file.read_text().splitlines()]


EVERY = [f"{shard}-{k}" for shard in range(4) for k in range(ROWS)]


def test_a_row_that_kills_its_worker_is_left_out_alone(tmp_path):
    def poison(place):
        import os
        import signal

        if place == "2-3":
            os.kill(os.getpid(), signal.SIGKILL)

    shown, seen = Shown(), []
    shards.run_shards(operator(tmp_path, poison), shard_numbers(range(4)), shown, lambda *counts: seen.append(counts))
    assert committed(tmp_path) == [f"{place} killed" if place == "2-3" else place for place in EVERY]
    assert shown.n == len(EVERY)
    assert sorted(seen) == [(ROWS, 0)] * 3 + [(ROWS, 1)]


def test_a_fault_that_passes_costs_an_attempt(tmp_path):
    def once(place):
        mark = tmp_path / f"{place}.met"
        if place == "1-0" and not mark.exists():
            mark.touch()
            raise TimeoutError("the storage is slow")

    shards.run_shards(operator(tmp_path, once), shard_numbers(range(4)), Shown())
    assert committed(tmp_path) == EVERY


def test_a_fault_that_stays_stops_the_run_and_counts_against_no_row(tmp_path):
    def always(place):
        if place.startswith("1-"):
            raise PermissionError("403")

    with pytest.raises(StorageUnavailable, match="403"):
        shards.run_shards(operator(tmp_path, always), shard_numbers(range(4)), Shown())
    assert not (tmp_path / "1.txt").exists()
    shards.run_shards(operator(tmp_path, lambda place: None), shard_numbers([1]), Shown())
    assert [line for line in committed(tmp_path) if line.startswith("1-")] == EVERY[ROWS : 2 * ROWS]


def test_a_mistake_of_the_user_is_told_as_one(tmp_path):
    def gone(place):
        raise UserError("a.png was listed and is gone")

    with pytest.raises(UserError, match=r"a\.png was listed"):
        shards.run_shards(operator(tmp_path, gone), shard_numbers([0]), Shown())


def test_a_row_too_large_for_memory_is_left_out_alone(tmp_path):
    def large(place):
        if place == "2-3":
            raise MemoryError

    shards.run_shards(operator(tmp_path, large), shard_numbers(range(4)), Shown())
    assert committed(tmp_path) == [f"{place} killed" if place == "2-3" else place for place in EVERY]


def test_a_fault_while_a_shard_is_isolated_costs_an_attempt(tmp_path):
    def poison_then_fault(place):
        import os
        import signal

        if place == "2-3":
            os.kill(os.getpid(), signal.SIGKILL)
        mark = tmp_path / f"{place}.met"
        if place == "2-4" and os.environ.get("ISOLATED") and not mark.exists():
            mark.touch()
            raise TimeoutError("the storage is slow")

    class Isolated(type(operator(tmp_path, poison_then_fault))):
        def isolate(self, block, placement):
            return super().isolate(block, {"runtime_env": {"env_vars": {"ISOLATED": "1"}}})

    shards.run_shards(Isolated(), shard_numbers(range(4)), Shown())
    assert (tmp_path / "2-4.met").exists()
    assert committed(tmp_path) == [f"{place} killed" if place == "2-3" else place for place in EVERY]
