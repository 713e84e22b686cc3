"""The whole training loop against a bare PyTorch loop over tensors in memory: same model, batch, precision, device.

And against the same loop as diffusers' examples have it, which encode every image anew at every step.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time

import torch
from bare import Bare
from report import emit
from table import LABELS, training_spec

from cluster.storage import Folder
from pipelines.generator.autoencoder.model import new_autoencoder
from pipelines.generator.denoiser.network import build_denoiser
from pipelines.generator.denoiser.objective import Objective
from pipelines.generator.latents.dataset import CachedReader
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.generator.training.loop import run_training_loop
from pipelines.graph.compose import load_settings
from pipelines.learning.precision import autocast
from pipelines.monitor.journal import read_journal

LATENT, WIDTH, ROWS, ROUNDS, STEPS = (4, 16, 16), 128, 2_048, 12, 4


class Loop:
    """Steps of the bare loop over batches that `encode` makes."""

    def __init__(self, settings, encode):
        model = build_denoiser(settings.denoiser, settings.condition, LATENT, {"embedding": (WIDTH,)}, list(LABELS))
        self.bare = Bare(model, Objective(settings.objective, settings.condition, "cpu", torch.channels_last))
        self.batch, self.encode, self.cursor = settings.trainer.batch, encode, 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            draw = self.bare.objective.draw_randomness((self.batch, *LATENT), 0, self.cursor)
            self.cursor += self.batch
            latents, embedding = self.encode(draw)
            self.bare.step(latents, {"embedding": embedding, "labels": torch.zeros(self.batch, len(LABELS))}, draw)


def cached(batch: int):
    mean, logvar = torch.randn(batch, *LATENT), torch.full((batch, *LATENT), -8.0)
    embedding = torch.randn(batch, WIDTH)
    return lambda draw: (mean + (0.5 * logvar).exp() * draw.posterior, embedding)


def online(settings):
    """Autoencoder and encoder at every step, as diffusers' examples train."""
    autoencoder = new_autoencoder(settings.autoencoder, settings.data.size).eval()
    encoder = Encoder(image_size=settings.data.size, options=settings.encoder.options).eval()
    images = torch.rand(settings.trainer.batch, 1, settings.data.size, settings.data.size)

    @torch.no_grad()
    def encode(draw):
        with autocast():
            posterior = autoencoder.encode(images * 2 - 1).latent_dist
            return posterior.mean.float() + posterior.std.float() * draw.posterior, encoder.embed(images)

    return encode


def main() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    chunk = load_settings("profile=demo").trainer.batch * STEPS
    settings = load_settings("profile=demo", f"trainer.images={chunk * (ROUNDS + 1)}",
                             f"trainer.checkpoint_every={chunk}", "trainer.checkpoint_seconds=0",
                             f"trainer.log_every={chunk}", "trainer.ema_snapshots=1")
    bare, slow = Loop(settings, cached(settings.trainer.batch)), Loop(settings, online(settings))
    times: dict[str, list[float]] = {"ours": [], "bare": [], "online": []}
    start_time = 0.0

    def between(engine, cursor, since) -> None:
        """Ours has just taken its steps; now the others take as many."""
        nonlocal start_time
        times["ours"].append(time.perf_counter() - start_time)
        for name, loop in (("bare", bare), ("online", slow)):
            start = time.perf_counter()
            loop.steps(STEPS)
            times[name].append(time.perf_counter() - start)
        start_time = time.perf_counter()

    with tempfile.TemporaryDirectory() as staging_dir:
        spec = training_spec(Folder(staging_dir), settings, ROWS, LATENT, WIDTH)
        latent_spec = read_latent_spec(spec.latents)
        reader = CachedReader(spec.latents, latent_spec, settings.seed, settings.condition.used)
        run_training_loop(spec, latent_spec, reader, 0, 1, None, between, lambda: False)
        entries = read_journal(spec.folder)
    rates = {name: chunk / statistics.median(seconds[1:]) for name, seconds in times.items()}
    parameters = sum(p.numel() for p in bare.bare.model.parameters())

    def ratio(name: str) -> float:
        return statistics.median(other / ours for other, ours in zip(times[name][1:], times["ours"][1:], strict=True))

    emit("train", ratio("bare"), 0.97, images_per_second=round(rates["ours"], 1), baseline=round(rates["bare"], 1),
         against="bare PyTorch loop over cached tensors: autocast, AdamW, clipping and EMA", parameters=parameters)
    emit("train_online", ratio("online"), 1.0, baseline=round(rates["online"], 1),
         against="the same loop with autoencoder and encoder at every step")
    wait = statistics.mean(entry["data_wait_fraction"] for entry in entries[1:])
    emit("data_wait", 0.02 / max(wait, 1e-9), 1.0, fraction=round(wait, 5), against="2 % of the time")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
