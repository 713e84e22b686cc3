"""A training step through DeepSpeed against a bare PyTorch loop: same model, batch, precision and device."""

from __future__ import annotations

import os

import torch
from report import alternate, emit

from pipelines.compose import load_settings
from pipelines.generator.denoiser import build
from pipelines.generator.engine import Engine
from pipelines.generator.fit import autocast
from pipelines.generator.objective import Objective

LATENT, WIDTH, ROUNDS = (4, 16, 16), 128, 40


def main() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    settings = load_settings("profile=demo")
    batch = settings.trainer.batch
    latents, embedding = torch.randn(batch, *LATENT), torch.randn(batch, WIDTH)
    labels = torch.zeros(batch, 2)
    objective = Objective(settings.objective, "cpu")

    engine = Engine(build(settings.denoiser, LATENT, WIDTH, ["a", "b"]), settings.trainer, 1)
    bare = build(settings.denoiser, LATENT, WIDTH, ["a", "b"])
    average = [p.detach().clone() for p in bare.parameters()]
    optimizer = torch.optim.AdamW(bare.parameters(), 1e-3, fused=True)
    cursor = 0

    def ours() -> int:
        nonlocal cursor
        draw = objective.draw((batch, *LATENT), 0, cursor)
        cursor += batch
        engine.step(objective.losses(engine.module, latents, embedding, labels, draw).mean(), 1e-3, batch, cursor)
        return batch

    def baseline() -> int:
        draw = objective.draw((batch, *LATENT), 0, cursor)
        with autocast():
            loss = objective.losses(bare, latents, embedding, labels, draw).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in bare.parameters()], 0.01)
        return batch

    ratio, rate, plain = alternate(ours, baseline, ROUNDS)
    emit("train", ratio, 0.97, images_per_second=round(rate, 1), baseline=round(plain, 1),
         against="bare PyTorch loop, autocast, AdamW, clipping and EMA",
         parameters=sum(p.numel() for p in bare.parameters()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
