"""What the denoiser learns: a noise process, the loss to its target, and what is dropped from the condition.

A process mixes clean latents of unit variance with noise at a level, says what the network is to predict of the
mixture, and which diffusers scheduler samples from a network that predicts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    SchedulerMixin,
)
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.generator.settings import CONDITIONS, NOISE_LEVELS, ConditionSettings, ObjectiveSettings
from pipelines.learning.order import step_seed

SIGMA_DATA = 1.0  # latents are scaled to it


@dataclass(frozen=True)
class Draw:
    """All randomness of one step's local share of the batch; the same whatever the number of workers."""

    posterior: Tensor  # standard normal (B, c, h, w): where in the autoencoder's posterior the latent lies
    noise: Tensor  # standard normal (B, c, h, w)
    level: Tensor  # uniform in [0, 1) (B,): the quantile of the noise level
    drop: dict[str, Tensor]  # bool (B,) for every kind of condition
    hidden: Tensor | None = None  # bool (B, findings): labels to make unknown

    def rows(self, part: slice) -> Draw:
        """The draw of a part of the images."""
        return Draw(self.posterior[part], self.noise[part], self.level[part],
                    {name: value[part] for name, value in self.drop.items()},
                    None if self.hidden is None else self.hidden[part])


@dataclass(frozen=True)
class Task:
    """Noisy input, timestep, target and loss weight."""

    noisy: Tensor  # (B, c, h, w)
    timesteps: Tensor  # (B,), as the sampling scheduler counts them
    target: Tensor  # (B, c, h, w)
    weight: Tensor  # (B,)


class Process(Protocol):
    def task(self, latents: Tensor, noise: Tensor, level: Tensor) -> Task: ...
    def scheduler(self) -> SchedulerMixin: ...


class Objective:
    """A process, and the distance between what the network answers and what it should.

    Args:
        layout: memory format of what the network is given.
    """

    def __init__(self, settings: ObjectiveSettings, condition: ConditionSettings, device: str,
                 layout: torch.memory_format = torch.contiguous_format) -> None:
        self.settings, self.condition, self.device, self.layout = settings, condition, device, layout
        self.process = process(settings, device)

    def draw(self, shape: tuple[int, ...], seed: int, cursor: int, rank: int = 0, world: int = 1,
             findings: int = 0) -> Draw:
        """This rank's share of what the step at `cursor` images draws for a global batch of `shape` (B, c, h, w).

        Of `condition.hide_findings` of the images each of the `findings` is hidden with a probability of the image's
        own, uniform in [0, 1), so that any number of known findings is as likely.
        """
        generator = torch.Generator(self.device).manual_seed(step_seed(seed, cursor))
        batch = shape[0]
        share = slice(rank * batch // world, (rank + 1) * batch // world)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)[share]

        def uniform(*columns: int) -> Tensor:
            return torch.rand(batch, *columns, generator=generator, device=self.device)[share]

        drop_all = uniform() < self.condition.drop_all
        draw = Draw(normal(), normal(), uniform(), {
            name: drop_all | (uniform() < getattr(self.condition, f"drop_{name}")) for name in CONDITIONS})
        if not findings or not self.condition.hide_findings:
            return draw
        rate = uniform() * (uniform() < self.condition.hide_findings)
        return replace(draw, hidden=uniform(findings) < rate[:, None])

    def losses(self, model: nn.Module, latents: Tensor, given: dict[str, Tensor], draw: Draw) -> Tensor:
        """Weighted losses (B,) of the predictions for clean `latents` (B, c, h, w) of unit variance.

        `given` holds the conditions (B, ...) by name.
        """
        if draw.hidden is not None:
            given = given | {"labels": given["labels"].masked_fill(draw.hidden, -1)}
        task = self.process.task(latents, draw.noise, draw.level)
        dtype = next(model.parameters()).dtype
        noisy = task.noisy.to(dtype, memory_format=self.layout)
        predicted = model(noisy, task.timesteps, given, draw.drop).float()
        if self.settings.loss == "huber":
            error = F.huber_loss(predicted, task.target, reduction="none", delta=self.settings.huber_delta)
        else:
            pointwise = F.mse_loss if self.settings.loss == "l2" else F.l1_loss
            error = pointwise(predicted, task.target, reduction="none")
        return error.flatten(1).mean(1) * task.weight


def process(settings: ObjectiveSettings, device: str) -> Process:
    """The noise process of the settings, its tables on `device`."""
    kinds: dict[str, Callable[[ObjectiveSettings, str], Process]] = {"diffusion": Diffusion, "edm": Edm, "flow": Flow}
    return kinds[settings.process](settings, device)


def _normal(settings: ObjectiveSettings, level: Tensor) -> Tensor:
    """Quantiles of the normal that the noise levels come of."""
    usual = NOISE_LEVELS[settings.process][_levels(settings)]
    mean = usual[0] if settings.level_mean is None else settings.level_mean
    std = usual[1] if settings.level_std is None else settings.level_std
    return mean + std * torch.special.ndtri(level.clamp(1e-6, 1 - 1e-6))


def _levels(settings: ObjectiveSettings) -> str:
    return settings.noise_levels or next(iter(NOISE_LEVELS[settings.process]))


def _unit(settings: ObjectiveSettings, level: Tensor) -> Tensor:
    """Levels in [0, 1): uniform, or the sigmoid of a normal (Esser et al. 2024, arXiv 2403.03206)."""
    return level if _levels(settings) == "uniform" else _normal(settings, level).sigmoid()


class Diffusion:
    """Gaussian diffusion in discrete steps (Ho et al. 2020), with zero terminal SNR where the target allows it, so that
    sampling starts from what training ended with and brightness is free (Lin et al. 2023, arXiv 2305.08891)."""

    def __init__(self, settings: ObjectiveSettings, device: str) -> None:
        self.settings = settings
        self.training = DDPMScheduler(
            num_train_timesteps=settings.timesteps,
            beta_schedule=settings.schedule,
            beta_start=settings.beta_start,
            beta_end=settings.beta_end,
            prediction_type=settings.prediction,
            rescale_betas_zero_snr=settings.prediction != "epsilon",
            timestep_spacing="trailing",
            clip_sample=False,
        )
        signal = self.training.alphas_cumprod.to(device)
        self.training.alphas_cumprod = signal
        self.snr = signal / (1 - signal)

    def task(self, latents: Tensor, noise: Tensor, level: Tensor) -> Task:
        steps = self.settings.timesteps
        timesteps = (_unit(self.settings, level) * steps).long().clamp(max=steps - 1)
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.training.get_velocity(latents, noise, timesteps),
        }[self.settings.prediction]()
        return Task(self.training.add_noise(latents, noise, timesteps), timesteps, target, self.weight(timesteps))

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

    def scheduler(self) -> SchedulerMixin:
        """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) on the schedule that was trained."""
        return DPMSolverMultistepScheduler.from_config(self.training.config, algorithm_type="dpmsolver++")


class Edm:
    """EDM preconditioning (Karras et al. 2022, arXiv 2206.00364): input, output and loss of unit variance at every
    noise level, whose logarithm is normal."""

    def __init__(self, settings: ObjectiveSettings, device: str) -> None:
        self.settings = settings

    def task(self, latents: Tensor, noise: Tensor, level: Tensor) -> Task:
        sigma = _normal(self.settings, level).exp()
        wide = sigma.view(-1, 1, 1, 1)
        both = wide.square() + SIGMA_DATA**2
        noisy = latents + wide * noise
        skip, out = SIGMA_DATA**2 / both, wide * SIGMA_DATA / both.sqrt()
        return Task(noisy / both.sqrt(), sigma.log() / 4, (latents - skip * noisy) / out, torch.ones_like(sigma))

    def scheduler(self) -> SchedulerMixin:
        return EDMDPMSolverMultistepScheduler(sigma_min=self.settings.sigma_min, sigma_max=self.settings.sigma_max,
                                              sigma_data=SIGMA_DATA)


class Flow:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): straight lines from data to noise, and their velocity."""

    def __init__(self, settings: ObjectiveSettings, device: str) -> None:
        self.settings = settings

    def task(self, latents: Tensor, noise: Tensor, level: Tensor) -> Task:
        share = _unit(self.settings, level)
        wide = share.view(-1, 1, 1, 1)
        return Task((1 - wide) * latents + wide * noise, share * self.settings.timesteps, noise - latents,
                    torch.ones_like(share))

    def scheduler(self) -> SchedulerMixin:
        return DPMSolverMultistepScheduler(num_train_timesteps=self.settings.timesteps, use_flow_sigmas=True,
                                           prediction_type="flow_prediction", algorithm_type="dpmsolver++",
                                           timestep_spacing="trailing")
