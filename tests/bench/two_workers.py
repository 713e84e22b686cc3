"""Two workers under ZeRO-2 against torch's DistributedDataParallel: same model, batch, precision and processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from bare import Bare
from report import alternate, emit
from torch.nn.parallel import DistributedDataParallel

from pipelines.generator.denoiser.network import build_denoiser
from pipelines.generator.denoiser.objective import Objective
from pipelines.generator.training.deepspeed import DeepSpeedTrainer
from pipelines.graph.compose import load_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines" / "generator" / "training"))
from distributed import run

LATENT, WIDTH, ROUNDS, STEPS = (4, 16, 16), 128, 10, 3


def measure(rank: int, world: int) -> tuple[float, float, float]:
    settings = load_settings("profile=demo", f"trainer.workers={world}", "trainer.zero_stage=2")
    batch = settings.trainer.batch
    share = batch // world
    latents = torch.randn(share, *LATENT)
    conditions = {"embedding": torch.randn(share, WIDTH), "labels": torch.zeros(share, 2)}
    objective = Objective(settings.objective, settings.condition, "cpu", torch.channels_last)

    def model():
        return build_denoiser(settings.denoiser, settings.condition, LATENT, {"embedding": (WIDTH,)}, ["a", "b"])

    engine, bare = DeepSpeedTrainer(model(), settings.trainer, world), Bare(DistributedDataParallel(model()), objective)
    finite, cursor = torch.tensor(True), 0

    def draw():
        nonlocal cursor
        cursor += batch
        return objective.draw_randomness((batch, *LATENT), 0, cursor, rank, world)

    def ours() -> int:
        for _ in range(STEPS):
            drawn = draw()
            engine.backward(objective.losses(engine.model, latents, conditions, drawn).mean(), last=True)
            engine.step(1e-3, batch, cursor, finite)
        return STEPS * batch

    def baseline() -> int:
        for _ in range(STEPS):
            bare.step(latents, conditions, draw())
        return STEPS * batch

    return alternate(ours, baseline, ROUNDS)


def main() -> None:
    ratio, rate, plain = run(2, measure)[0]
    emit("two_workers", ratio, 0.95, images_per_second=round(rate, 1), baseline=round(plain, 1),
         against="DistributedDataParallel with autocast, AdamW, clipping and EMA")


if __name__ == "__main__":
    main()
