"""What counts as the memory of a process, and what does not."""

from __future__ import annotations

import mmap
import subprocess
import sys
from multiprocessing import shared_memory

import numpy as np
import psutil
import pytest

from pipelines.monitor.memory import PeakMemory, process_mb

MIB = 1 << 20


@pytest.fixture
def grown():
    """MiB by which this process has grown since the fixture was made."""
    before = process_mb(psutil.Process())
    return lambda: process_mb(psutil.Process()) - before


def test_anonymous_and_shared_memory_count(grown):
    # mapped here: malloc may give an array memory that earlier tests freed, which adds nothing
    anonymous = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(64):
        anonymous.write(bytes(MIB))
    assert grown() == pytest.approx(64, abs=8)
    memory = shared_memory.SharedMemory(create=True, size=32 * MIB)
    try:
        for start in range(0, 32 * MIB, MIB):
            memory.buf[start:start + MIB] = bytes(MIB)
        assert grown() == pytest.approx(96, abs=8)
    finally:
        memory.close()
        memory.unlink()
        anonymous.close()


def test_a_memory_mapped_file_does_not_count(grown, tmp_path):
    np.save(tmp_path / "latents.npy", np.ones(64 * MIB, np.uint8))
    mapped = np.load(tmp_path / "latents.npy", mmap_mode="r")
    assert int(mapped.sum()) == 64 * MIB
    assert grown() < 8


def test_the_peak_is_of_the_whole_process_tree():
    with PeakMemory(0.05) as memory, subprocess.Popen(
            [sys.executable, "-c", "import time; held = b'x' * (96 << 20); print(flush=True); time.sleep(0.5)"],
            stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
    assert memory.peak_mb > memory.driver_mb + 90
