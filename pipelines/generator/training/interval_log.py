"""What training logs at each interval. Sums are kept on the device so that logging causes no host synchronisation."""

from __future__ import annotations

import math
import time

import psutil
import torch
from torch import Tensor

from cluster.session import device
from pipelines.monitor.journal import Journal

BINS = 4  # quarters of the noise-level quantile, from low to high noise
PEAK = {  # dense bf16 TFLOP/s by device name, from the vendors' data sheets (fp16 if no bf16)
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121,
    "A40": 150, "A10G": 70, "A10": 125, "A6000": 155, "4090": 165, "3090": 71, "V100": 125, "T4": 65,
}


class IntervalLogger:
    """Sums of one worker over an interval; `write` reduces them over all workers.

    Args:
        journal: metrics.jsonl, on rank 0 only.
        flops: per image of one training step.
        total: images of the complete training run.
    """

    def __init__(self, journal: Journal | None, world: int, flops: int, total: int, device: str) -> None:
        self.journal, self.world, self.flops, self.total, self.device = journal, world, flops, total, device
        self.peak = peak_flops() * world
        self.checkpoint_stall_seconds = 0.0  # seconds that training waited for checkpoints
        self._waited, self._last_ema_distance = 0.0, math.nan
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, BINS, device=self.device)  # losses and their number
        self._start, self._images, self.checkpoint_stall_seconds = time.perf_counter(), 0, 0.0

    def add(self, losses: Tensor, level: Tensor, images: int) -> None:
        """Add the losses (B,) and noise levels in [0, 1) (B,) of this worker's share of a batch of `images`."""
        finite = torch.isfinite(losses)
        bins = (level * BINS).long()
        self._sums[0].index_add_(0, bins, torch.where(finite, losses, 0).float())
        self._sums[1].index_add_(0, bins, finite.float())
        self._images += images

    def write(self, seen: int, waited: float, norms: dict[str, float], **values: float) -> None:
        """Log the interval that ended at `seen` images; a collective.

        Args:
            waited: seconds that this worker has waited for data since it started.
            norms: of weights, gradient and EMAs, from `DeepSpeedTrainer.norms`.
        """
        if self.world > 1:
            torch.distributed.all_reduce(self._sums)
        sums, counts = self._sums.tolist()
        seconds = time.perf_counter() - self._start
        rate = self._images / seconds
        metrics: dict[str, float] = {"loss": sum(sums) / sum(counts)} if sum(counts) else {}
        metrics |= {f"loss_noise_{k + 1}": loss / n for k, (loss, n) in enumerate(zip(sums, counts, strict=True)) if n}
        metrics |= norms | values
        metrics |= {"tflops": rate * self.flops / 1e12, "data_wait_fraction": (waited - self._waited) / seconds,
                  "checkpoint_stall_seconds": self.checkpoint_stall_seconds, "memory_mb": memory_mb(),
                  "seconds_left": (self.total - seen) / rate, "workers": self.world}
        if self.peak:
            metrics["mfu"] = metrics["tflops"] * 1e12 / self.peak
        entry: dict[str, float | str] = {name: float(f"{value:.6g}") for name, value in metrics.items()
                                         if math.isfinite(value)}
        if norms["ema_distance"] == self._last_ema_distance:
            entry["warning"] = ("the EMA is not being updated: its distance to the weights did not change since the "
                                "last log line")
        self._last_ema_distance, self._waited = norms["ema_distance"], waited
        if self.journal is not None:
            self.journal.log(seen, **entry)
        self._reset()


def peak_flops() -> float:
    """Peak FLOP/s of this process's GPU; 0 if unknown or without a GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((tflops * 1e12 for part, tflops in PEAK.items() if part in name), 0.0)


def memory_mb() -> float:
    """Peak GPU memory since the last call in MiB; without a GPU, the resident memory of this process."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_info().rss / 2**20
    most = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return most


def finite_everywhere(losses: Tensor, world: int) -> Tensor:
    """Whether the losses of all workers are finite, as one bool on the device; a collective."""
    bad = (~torch.isfinite(losses)).any().float()
    if world > 1:
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    return bad == 0


def everywhere(condition: bool, world: int) -> bool:
    """Whether the condition holds on all workers; a collective."""
    if world == 1:
        return condition
    agreed = torch.tensor(float(condition), device=device())
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
    return bool(agreed)
