"""What training logs each interval. Sums stay on the device, so that no step waits for it."""

from __future__ import annotations

import math
import time

import psutil
import torch
from torch import Tensor

from pipelines.monitor.journal import Journal

BINS = 4  # quarters of the quantile of the noise level, from the least noise to the most
PEAK = {  # dense bf16 TFLOP/s by part of the device's name, as the makers' data sheets tell them (fp16 where no bf16)
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121,
    "A40": 150, "A10G": 70, "A10": 125, "A6000": 155, "4090": 165, "3090": 71, "V100": 125, "T4": 65,
}


class Meter:
    """Sums over one interval, of one worker; `write` brings the workers' together.

    Args:
        journal: metrics.jsonl, on rank 0 only.
        flops: of one image in one training step.
        total: images of the whole training.
    """

    def __init__(self, journal: Journal | None, world: int, flops: int, total: int, device: str) -> None:
        self.journal, self.world, self.flops, self.total, self.device = journal, world, flops, total, device
        self.peak = peak_flops() * world
        self.stalled = 0.0  # seconds that checkpoints kept the training waiting
        self._waited = self._moved = 0.0
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, BINS, device=self.device)  # losses and their number
        self._start, self._images, self.stalled = time.perf_counter(), 0, 0.0

    def add(self, losses: Tensor, level: Tensor, images: int) -> None:
        """Take in the losses (B,) and noise levels in [0, 1) (B,) of this worker's share of a batch of `images`."""
        finite = torch.isfinite(losses)
        bins = (level * BINS).long()
        self._sums[0].index_add_(0, bins, torch.where(finite, losses, 0).float())
        self._sums[1].index_add_(0, bins, finite.float())
        self._images += images

    def write(self, seen: int, waited: float, norms: dict[str, float], **values: float) -> None:
        """A collective: log the interval that ended at `seen` images.

        Args:
            waited: seconds that this worker has waited for data since it started.
            norms: what the engine tells of weights, gradient and averages.
        """
        if self.world > 1:
            torch.distributed.all_reduce(self._sums)
        sums, counts = self._sums.tolist()
        seconds = time.perf_counter() - self._start
        rate = self._images / seconds
        found: dict[str, float] = {"loss": sum(sums) / sum(counts)} if sum(counts) else {}
        found |= {f"loss_noise_{k + 1}": loss / n for k, (loss, n) in enumerate(zip(sums, counts, strict=True)) if n}
        found |= norms | values
        found |= {"tflops": rate * self.flops / 1e12, "data_wait_fraction": (waited - self._waited) / seconds,
                  "checkpoint_stall_seconds": self.stalled, "memory_mb": memory_mb(),
                  "seconds_left": (self.total - seen) / rate, "workers": self.world}
        if self.peak:
            found["mfu"] = found["tflops"] * 1e12 / self.peak
        told: dict[str, float | str] = {name: float(f"{value:.6g}") for name, value in found.items()
                                        if math.isfinite(value)}
        if norms["ema_distance"] == self._moved:
            told["warning"] = "the average of the weights does not move; it should be a little off them, and change"
        self._moved, self._waited = norms["ema_distance"], waited
        if self.journal is not None:
            self.journal.log(seen, **told)
        self._reset()


def peak_flops() -> float:
    """FLOP/s of this process's GPU at its best, or 0 where it is unknown or there is none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((tflops * 1e12 for part, tflops in PEAK.items() if part in name), 0.0)


def memory_mb() -> float:
    """MiB at most on the GPU since the last call; of this process's memory, now, where there is none."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_info().rss / 2**20
    most = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return most


def finite_everywhere(losses: Tensor, world: int) -> Tensor:
    """One bool on the device: whether all losses of all workers are finite; a collective."""
    bad = (~torch.isfinite(losses)).any().float()
    if world > 1:
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    return bad == 0
