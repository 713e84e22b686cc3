"""What is a fault of the storage, and what is a file that is gone."""

import time

import pytest

from cluster.errors import UserError
from cluster.faults import StorageUnavailable, read_listed, with_retries
from cluster.storage import Folder

WAITS = (0.01, 0.01)


@pytest.fixture
def films(tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.png").write_bytes(b"pixels")
    return Folder(str(tmp_path / "films"))


@pytest.mark.parametrize("error", [PermissionError("403"), TimeoutError("slow"), FileNotFoundError("not mounted yet"),
                                   OSError(5, "input/output error")])
def test_a_fault_that_passes_costs_an_attempt(error):
    faults = [error, error]

    def read() -> bytes:
        if faults:
            raise faults.pop()
        return b"pixels"

    waits = (*WAITS, 1.0)  # time enough for two attempts on a machine that is busy
    assert with_retries(read, "s3://films/a.png", waits) == b"pixels"


def test_a_fault_that_stays_names_the_place(films):
    def read() -> bytes:
        raise PermissionError("403")

    with pytest.raises(StorageUnavailable, match=r"s3://films/a\.png.*403"):
        with_retries(read, "s3://films/a.png", WAITS)


def test_a_bug_is_no_fault_of_the_storage():
    with pytest.raises(ZeroDivisionError):
        with_retries(lambda: 1 / 0, "s3://films/a.png", WAITS)


def test_a_listed_file_that_is_gone_is_told_from_a_folder_that_is_not_mounted(films, tmp_path):
    assert read_listed(films, "a.png", WAITS) == b"pixels"
    with pytest.raises(UserError, match=r"b\.png was listed but no longer exists"):
        read_listed(films, "b.png", WAITS)
    for place in ("unmounted", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(StorageUnavailable, match=place):
            read_listed(Folder(str(tmp_path / place)), "a.png", WAITS)


def test_a_mount_that_is_missing_below_the_folder_is_no_file_that_is_gone(films, tmp_path):
    (tmp_path / "films" / "train").mkdir()
    with pytest.raises(StorageUnavailable, match=r"train/a\.png"):
        read_listed(films, "train/a.png", WAITS)


def test_attempts_that_are_slow_to_fail_are_bounded_in_time():
    calls = []

    def timeout() -> bytes:
        calls.append(time.sleep(0.1))
        raise TimeoutError("no answer")

    with pytest.raises(StorageUnavailable, match="after 1 attempts"):
        with_retries(timeout, "s3://films/a.png", (0.01,) * 5)
    assert len(calls) == 1
