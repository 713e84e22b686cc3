"""The search for near-duplicates among as many hashes as the large mix has images."""

from __future__ import annotations

import resource
import time

import numpy as np
from report import emit

from pipelines.data.duplicates import duplicate_groups

IMAGES, PLANTED, RADIUS = 868_000, 10_000, 10
PART = 7_000  # images made at a time, so that making them is not what is measured
SECONDS, MIB = 60.0, 512.0  # the goals


def main() -> None:
    rng = np.random.default_rng(0)
    alike = rng.random(256) < 0.5  # films resemble each other: half of the bits are the same for nine in ten of them
    hashes = np.concatenate([np.packbits(rng.random((PART, 256), np.float32) < np.where(alike, 0.5, 0.1), axis=1)
                             for _ in range(IMAGES // PART)])
    for k in range(PLANTED):
        flips = np.zeros(256, np.uint8)
        flips[rng.choice(256, k % (RADIUS + 1), replace=False)] = 1
        hashes[IMAGES - 1 - k] = hashes[k] ^ np.packbits(flips)
    ids = np.arange(IMAGES)
    start = time.perf_counter()
    found = duplicate_groups(ids, hashes, RADIUS)
    seconds = time.perf_counter() - start
    planted = float(np.mean(found[:PLANTED] == found[::-1][:PLANTED]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    emit("duplicates", SECONDS / seconds, 1.0, seconds=round(seconds, 1), images=IMAGES,
         found_of_planted=round(planted, 4), against="60 s")
    emit("duplicates_memory", MIB / peak, 1.0, peak_rss_mb=round(peak), against="512 MiB")


if __name__ == "__main__":
    main()
