"""What the denoiser learns: the noise schedule, the target, the weights, and what is dropped from the condition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from pipelines.generator.fit import step_seed
from pipelines.settings import Objective as ObjectiveSettings


@dataclass(frozen=True)
class Draw:
    """All randomness of one step's local share of the batch; the same whatever the number of workers."""

    posterior: Tensor  # standard normal (B, c, h, w): where in the autoencoder's posterior the latent lies
    noise: Tensor  # standard normal (B, c, h, w)
    timesteps: Tensor  # int64 (B,)
    drop_embedding: Tensor  # bool (B,)
    drop_labels: Tensor  # bool (B,)


class Objective:
    """Gaussian diffusion with a diffusers schedule."""

    def __init__(self, settings: ObjectiveSettings, device: str) -> None:
        self.settings, self.device = settings, device
        self.scheduler = training_scheduler(settings)
        signal = self.scheduler.alphas_cumprod.to(device)
        self.scheduler.alphas_cumprod = signal
        self.snr = signal / (1 - signal)

    def draw(self, shape: tuple[int, ...], seed: int, cursor: int, rank: int = 0, world: int = 1) -> Draw:
        """This rank's share of what the step at `cursor` images draws for a global batch of `shape` (B, c, h, w)."""
        generator = torch.Generator(self.device).manual_seed(step_seed(seed, cursor))
        batch = shape[0]
        share = slice(rank * batch // world, (rank + 1) * batch // world)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)[share]

        def uniform() -> Tensor:
            return torch.rand(batch, generator=generator, device=self.device)[share]

        settings, drop_all = self.settings, uniform() < self.settings.drop_all
        return Draw(
            posterior=normal(),
            noise=normal(),
            timesteps=(uniform() * settings.timesteps).long(),
            drop_embedding=drop_all | (uniform() < settings.drop_embedding),
            drop_labels=drop_all | (uniform() < settings.drop_labels),
        )

    def loss(self, model: nn.Module, latents: Tensor, embedding: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        """Weighted mean squared error of the prediction for clean `latents` (B, c, h, w) of unit variance."""
        noisy = self.scheduler.add_noise(latents, draw.noise, draw.timesteps)
        target = {
            "epsilon": lambda: draw.noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, draw.noise, draw.timesteps),
        }[self.settings.prediction]()
        dtype = next(model.parameters()).dtype
        predicted = model(noisy.to(dtype), draw.timesteps, (embedding, labels, draw.drop_embedding, draw.drop_labels))
        error = (predicted.float() - target).square().mean((1, 2, 3))
        return (error * self.weight(draw.timesteps)).mean()

    def weight(self, timesteps: Tensor) -> Tensor:
        """min-SNR-gamma weights (B,) for the chosen prediction (Hang et al. 2023, arXiv 2303.09556).

        For v they are the paper's with one added to the SNR before the cap, as in diffusers' training examples: they
        do not vanish where the SNR does, which is where sampling starts.
        """
        if self.settings.min_snr is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = self.snr[timesteps]
        capped = snr.clamp(max=self.settings.min_snr)
        return {
            "sample": capped,
            "epsilon": capped / snr.clamp(min=1e-8),
            "v_prediction": (snr + 1).clamp(max=self.settings.min_snr) / (snr + 1),
        }[self.settings.prediction]


def training_scheduler(settings: ObjectiveSettings) -> DDPMScheduler:
    """With zero terminal SNR where the target allows it, so that sampling starts from what training ended with and
    brightness is free (Lin et al. 2023, arXiv 2305.08891)."""
    return DDPMScheduler(
        num_train_timesteps=settings.timesteps,
        beta_schedule=settings.schedule,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        prediction_type=settings.prediction,
        rescale_betas_zero_snr=settings.prediction != "epsilon",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def sampling_scheduler(settings: ObjectiveSettings) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) on the schedule that was trained."""
    return DPMSolverMultistepScheduler.from_config(training_scheduler(settings).config, algorithm_type="dpmsolver++")
