"""Samples images from a generator, with one seed per image: image k is the same in any batch, shard or actor pool."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.export import load_pipeline
from pipelines.learning.order import step_seed
from pipelines.learning.precision import bf16_is_fast
from synth.conditions import Condition


class Sampler:
    """A loaded generator that samples in batches of fixed size."""

    def __init__(self, generator: Folder, steps: int, guidance: float, batch: int) -> None:
        self.steps, self.guidance, self.batch = steps, guidance, batch
        with tempfile.TemporaryDirectory() as staging:
            generator.download(staging)
            self.pipeline = load_pipeline(Path(staging)).to(device())
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.to(memory_format=torch.channels_last)
        if bf16_is_fast():
            self.pipeline.denoiser.to(torch.bfloat16)
            self.pipeline.conditioner.to(torch.bfloat16)

    def sample(self, conditions: Iterable[Condition], seed: int, indices: Sequence[int]) -> np.ndarray:
        """uint8 images (N, H, W), one per condition; the noise of image k is seeded by (seed, indices[k]).

        Short batches are padded to the fixed size, so that no image depends on the number sampled with it.
        """
        images, remaining = [], iter(conditions)
        for start in range(0, len(indices), self.batch):
            batch = list(itertools.islice(remaining, self.batch))
            padded = batch + [batch[-1]] * (self.batch - len(batch))
            noise = [self._noise(seed, index) for index in indices[start : start + self.batch]]
            noise += [noise[-1]] * (self.batch - len(noise))
            sampled = self.pipeline(
                **{name: torch.from_numpy(np.stack([c.values[name] for c in padded]))
                   for name in self.pipeline.conditioner.shapes},
                latents=torch.stack(noise),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                output_type="pt",
            ).images
            images.append((sampled[: len(batch), 0] * 255).round().to(torch.uint8).cpu().numpy())
        return np.concatenate(images)

    def _noise(self, seed: int, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step_seed(seed, index))
        return torch.randn(self.pipeline.latent, generator=generator)
