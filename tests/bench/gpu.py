"""`make bench-gpu`: training throughput of large denoisers on one GPU, each measure of speed added to those before.

Without a GPU the same table is made of small networks, to show that it can be made.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from bare import Bare

from cluster.session import device
from pipelines.generator.denoiser.network import build_denoiser, compile_blocks, training_flops
from pipelines.generator.denoiser.objective import Objective
from pipelines.generator.training.deepspeed import DeepSpeedTrainer
from pipelines.generator.training.interval_log import memory_mb, peak_flops
from pipelines.graph.compose import load_settings

WIDTH = 768
LARGE = {"unet-300m": ((4, 32, 32), 128), "dit-l": ((4, 32, 32), 128)}  # latent and batch: 256 px
SMALL = {"unet-3m": ((4, 16, 16), 16), "dit-xs": ((4, 16, 16), 16)}
ADDED = ("plain", "channels-last", "compile", "DeepSpeed", "checkpointing")


def measure(name: str, latent: tuple[int, int, int], batch: int, added: int, steps: int) -> tuple[float, float, float]:
    """Images/s, TFLOP/s and MiB with the first `added` measures on top of a plain bf16 loop."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29578", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    on = set(ADDED[: added + 1])
    settings = load_settings("profile=demo", f"denoiser={name}", f"trainer.batch={batch}", "trainer.zero_stage=2",
                             f"trainer.activation_checkpointing={'checkpointing' in on}")
    where = device()
    model = build_denoiser(settings.denoiser, settings.condition, latent, {"embedding": (WIDTH,)}, [])
    flops = training_flops(model, latent)
    model = model.to(where)
    layout = torch.channels_last if "channels-last" in on else torch.contiguous_format
    if "checkpointing" in on:
        model.network.enable_gradient_checkpointing()
    if "compile" in on:
        compile_blocks(model.network)
    objective = Objective(settings.objective, settings.condition, where, layout)
    latents = torch.randn(batch, *latent, device=where)
    conditions = {"embedding": torch.randn(batch, WIDTH, device=where)}
    conditions["labels"] = torch.zeros(batch, 0, device=where)
    if "DeepSpeed" in on:
        engine, finite = DeepSpeedTrainer(model, settings.trainer, 1), torch.tensor(True, device=where)

        def step(k: int) -> None:
            drawn = objective.draw_randomness((batch, *latent), 0, k * batch)
            engine.backward(objective.losses(engine.model, latents, conditions, drawn).mean(), last=True)
            engine.step(1e-4, batch, (k + 1) * batch, finite)
    else:
        bare = Bare(model, objective)

        def step(k: int) -> None:
            bare.step(latents, conditions, objective.draw_randomness((batch, *latent), 0, k * batch))

    warm = max(steps // 4, 2)
    for k in range(warm):
        step(k)
    _wait()
    memory_mb()
    start = time.perf_counter()
    for k in range(warm, warm + steps):
        step(k)
    _wait()
    rate = steps * batch / (time.perf_counter() - start)
    return rate, rate * flops / 1e12, memory_mb()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    gpu = torch.cuda.is_available()
    peak, steps = peak_flops(), 40 if gpu else 3
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else 'no GPU: small networks'}, bf16, "
          f"latents {next(iter((LARGE if gpu else SMALL).values()))[0]}, {steps} steps\n")
    print(f"| {'network':<10} | {'with':<15} | images/s | TFLOP/s |   MFU | memory, MiB |")
    print(f"|{'-' * 12}|{'-' * 17}|---------:|--------:|------:|------------:|")
    for name, (latent, batch) in (LARGE if gpu else SMALL).items():
        for added, what in enumerate(ADDED):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:  # each row starts with a free GPU
                rate, tflops, memory = apart.submit(measure, name, latent, batch, added, steps).result()
            share = f"{tflops * 1e12 / peak:>5.1%}" if peak else "    -"
            print(f"| {name:<10} | {'+' if added else ''}{what:<{14 if added else 15}} | {rate:>8.1f} | {tflops:>7.3g} "
                  f"| {share} | {memory:>11,.0f} |", flush=True)


if __name__ == "__main__":
    main()
