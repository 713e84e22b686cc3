"""The sampler against a bare diffusers loop: the same network, solver, steps and guidance."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from report import alternate, emit

from cluster.storage import Folder
from pipelines.generator.autoencoder.model import new_autoencoder
from pipelines.generator.denoiser.network import build_denoiser
from pipelines.generator.denoiser.objective import process
from pipelines.generator.export import assemble, load_pipeline, save_pipeline
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.graph.compose import load_settings
from synth.conditions import Condition
from synth.sampler import Sampler

LATENT, WIDTH, ROUNDS = (4, 16, 16), 128, 3
GUIDANCE = (1.0, 2.0)  # the default, and one that needs two passes a step


def main() -> None:
    settings = load_settings("profile=demo")
    with tempfile.TemporaryDirectory() as staging_dir:
        denoiser = build_denoiser(settings.denoiser, settings.condition, LATENT, {"embedding": (WIDTH,)}, ["a", "b"])
        save_pipeline(Path(staging_dir), assemble(
            vae=new_autoencoder(settings.autoencoder, settings.data.size), denoiser=denoiser,
            scheduler=process(settings.objective, "cpu").scheduler(),
            encoder=Encoder(options=settings.encoder.options), num_inference_steps=1, guidance_scale=1.0))
        for guidance in GUIDANCE:
            compare(Folder(staging_dir), settings.sample.batch, settings.sample.steps, guidance)


def compare(generator: Folder, batch: int, steps: int, guidance: float) -> None:
    sampler = Sampler(generator, steps, guidance, batch)
    bare, dtype = load_pipeline(Path(generator.uri)), sampler.pipeline.unet.dtype
    bare.unet.to(dtype)
    bare.conditioner.to(dtype)
    embedding = np.random.default_rng(0).normal(size=WIDTH).astype(np.float32)
    condition = Condition({"embedding": embedding, "labels": np.array([1, 0], np.float32)}, ())

    def ours() -> int:
        return len(sampler.sample([condition] * batch, 0, range(batch)))

    @torch.no_grad()
    def baseline() -> int:
        conditions = {"embedding": torch.randn(batch, WIDTH), "labels": torch.zeros(batch, 2)}
        passes = (True, False) if guidance > 1 else (False,)  # without conditions and with them, or with them only
        context = torch.cat([bare.conditioner(conditions, dict.fromkeys(conditions, torch.full((batch,), dropped)))
                             for dropped in passes])
        latents = torch.randn(batch, *LATENT)
        bare.scheduler.set_timesteps(steps)
        for t in bare.scheduler.timesteps:
            predicted = bare.unet(latents.to(dtype).repeat(len(passes), 1, 1, 1), t, encoder_hidden_states=context)
            null, conditioned = predicted.sample.chunk(2) if guidance > 1 else (0, predicted.sample)
            guided = null + guidance * (conditioned - null)
            latents = bare.scheduler.step(guided, t, latents).prev_sample
        return len(bare.vae.decode(latents).sample)

    ratio, rate, plain = alternate(ours, baseline, ROUNDS)
    emit("sample", ratio, 1.0, images_per_second=round(rate, 2), baseline=round(plain, 2), steps=steps,
         guidance=guidance, against=f"bare diffusers loop, {dtype}")


if __name__ == "__main__":
    main()
