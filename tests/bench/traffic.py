"""`make traffic`: what a training asks of its storage at 8 to 512 GPUs, simulated, and where the storage saturates.

Stated, not measured: the bandwidths below, images/s per GPU, spot failures, and the seconds of a restart and a
validation. Simulated, by the rules of the trainer: a checkpoint is due after `checkpoint_every` images and
`checkpoint_seconds` seconds; one is written at a time, by all nodes at once, and training stands still while the next
waits for it; one is validated at a time, which reads its average; a node that starts reads the latents; after a failure
every GPU reads its part, and the first one the weights. Transfers share the storage equally, up to each node's network.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

GPUS_PER_NODE, GPUS = 8, (8, 64, 256, 512)
NETWORK = 3.1e9  # bytes/s of a node: 25 Gbit/s
STORAGES = {"100 Gbit/s": 12.5e9, "10 Gbit/s": 1.25e9}
LATENTS = 9e9  # bytes of 868,000 images at 256 px
RESTART, VALIDATION = 60.0, 60.0  # seconds
FAILURES = 1 / 24 / 3600  # of a node, per second
COPY = 20e9  # bytes/s from a GPU into pinned memory
VECTORS = 5  # weights, two moments, two averages
CHECKPOINT_EVERY = 1_000_000  # images
STEP, DURATION = 0.05, 3_600.0  # seconds
MODELS = {"unet-300m": (313e6, 3_500.0), "unet-860m": (862e6, 220.0)}  # parameters, and images/s of one GPU


@dataclass
class Storage:
    """Transfers that share a bandwidth."""

    bandwidth: float
    transfers: dict[str, list[float]] = field(default_factory=dict)  # bytes left and bytes/s at most, by name
    moved: float = 0.0

    def start(self, name: str, size: float, nodes: float) -> None:
        left = self.transfers[name][0] if name in self.transfers else 0.0
        self.transfers[name] = [left + size, nodes * NETWORK]

    def advance(self) -> None:
        free, waiting = self.bandwidth, len(self.transfers)
        for transfer in sorted(self.transfers.values(), key=lambda transfer: transfer[1]):
            rate = min(transfer[1], free / waiting)
            free, waiting = free - rate, waiting - 1
            self.moved += min(transfer[0], rate * STEP)
            transfer[0] -= rate * STEP
        self.transfers = {name: transfer for name, transfer in self.transfers.items() if transfer[0] > 0}


def simulate(parameters: float, rate: float, gpus: int, bandwidth: float, seconds: float) -> dict[str, float]:
    """An hour of training, from its start, with `seconds` between checkpoints at least."""
    nodes, state = gpus / GPUS_PER_NODE, 4 * VECTORS * parameters
    storage = Storage(bandwidth)
    storage.start("latents", nodes * LATENTS, nodes)
    images = saved = lost = 0.0
    saved_at, stalled, down, failing, validated_at, copying = 0.0, 0.0, 0.0, 0.0, -VALIDATION, 0.0
    kept, checkpoints, writes, write_start = 0.0, 0, 0.0, 0.0
    for tick in range(int(DURATION / STEP)):
        now = tick * STEP
        writing = "checkpoint" in storage.transfers
        storage.advance()
        if writing and "checkpoint" not in storage.transfers:
            checkpoints, writes, kept = checkpoints + 1, writes + now - write_start, saved
            if now - validated_at >= VALIDATION and "average" not in storage.transfers:
                validated_at = now
                storage.start("average", 4 * parameters, 1)
        failing += nodes * FAILURES * STEP
        if failing >= 1:
            failing, down = failing - 1, RESTART
            lost, images = lost + images - kept, kept
            saved = kept
            storage.transfers.pop("checkpoint", None)
            storage.start("restart", state, nodes)
            storage.start("weights", 4 * parameters, 1)
            storage.start("latents", LATENTS, 1)
            continue
        down = max(down - STEP, 0)
        if down or storage.transfers.keys() & {"latents", "restart", "weights"}:
            continue
        if copying > 0:
            copying -= STEP
            stalled += STEP
            continue
        if images - saved >= CHECKPOINT_EVERY and now - saved_at >= seconds:
            if "checkpoint" in storage.transfers:
                stalled += STEP
                continue
            saved, saved_at, write_start, copying = images, now, now, state / gpus / COPY
            storage.start("checkpoint", state, nodes)
        images += gpus * rate * STEP
    return {"images": images, "efficiency": images / (gpus * rate * DURATION), "stalled": stalled / DURATION,
            "interval": DURATION / max(checkpoints, 1), "write": writes / max(checkpoints, 1),
            "used": storage.moved / bandwidth / DURATION, "lost": lost / max(images, 1)}


def main() -> None:
    print("| denoiser | storage | GPUs | seconds apart, at least | between checkpoints | a write | training stalls | "
          "learnt again | storage in use | efficiency |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, (parameters, rate) in MODELS.items():
        for speed, bandwidth in STORAGES.items():
            for gpus in GPUS:
                for seconds in (0, 60):
                    found = simulate(parameters, rate, gpus, bandwidth, seconds)
                    print(f"| `{name}` | {speed} | {gpus} | {seconds} | {found['interval']:.1f} s | "
                          f"{found['write']:.1f} s | {found['stalled']:.1%} | {found['lost']:.1%} | "
                          f"{found['used']:.0%} | {found['efficiency']:.1%} |")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
