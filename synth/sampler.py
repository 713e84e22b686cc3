"""Images from a generator, one seed an image: image k of a seed is the same in any batch, shard or number of actors."""

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
    """A generator ready to sample in batches of one fixed size."""

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
        """uint8 images (N, H, W) of the conditions, image `indices[k]` of the run `seed` each.

        Short batches are filled up to the fixed size, so that no image depends on how many are sampled beside it.
        """
        images, coming = [], iter(conditions)
        for start in range(0, len(indices), self.batch):
            part = list(itertools.islice(coming, self.batch))
            filled = part + [part[-1]] * (self.batch - len(part))
            noise = [self._noise(seed, index) for index in indices[start : start + self.batch]]
            noise += [noise[-1]] * (self.batch - len(noise))
            found = self.pipeline(
                **{name: torch.from_numpy(np.stack([c.given[name] for c in filled]))
                   for name in self.pipeline.conditioner.shapes},
                latents=torch.stack(noise),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                output_type="pt",
            ).images
            images.append((found[: len(part), 0] * 255).round().to(torch.uint8).cpu().numpy())
        return np.concatenate(images)

    def _noise(self, seed: int, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step_seed(seed, index))
        return torch.randn(self.pipeline.latent, generator=generator)
