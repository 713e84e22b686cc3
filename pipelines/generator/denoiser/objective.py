"""The training objective: a noise process, the loss, and the random dropping of conditions.

A process mixes clean latents of unit variance with noise at a noise level, defines the prediction target, and names the
diffusers scheduler that samples from a network trained on it.
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
from pipelines.learning.order import share, step_seed

SIGMA_DATA = 1.0  # standard deviation that latents are normalised to
FLOW_SHIFT = 0.5  # of sampling times (Esser et al. 2024, arXiv 2403.03206, who use 3 for latents of 128x128)


@dataclass(frozen=True)
class StepRandomness:
    """All random numbers of this rank's share of a step; independent of the number of workers."""

    posterior: Tensor  # standard normal (B, c, h, w), to sample from the autoencoder's posterior
    noise: Tensor  # standard normal (B, c, h, w)
    level: Tensor  # uniform in [0, 1) (B,): the quantile of the noise level
    dropped: dict[str, Tensor]  # bool (B,) for every condition
    hidden: Tensor | None = None  # bool (B, findings): labels to set to unknown

    def rows(self, rows: slice) -> StepRandomness:
        """The random numbers of some of the images."""
        return StepRandomness(self.posterior[rows], self.noise[rows], self.level[rows],
                              {name: value[rows] for name, value in self.dropped.items()},
                              None if self.hidden is None else self.hidden[rows])


@dataclass(frozen=True)
class NoisyBatch:
    """Noisy input, timestep, target and loss weight."""

    noisy: Tensor  # (B, c, h, w)
    timesteps: Tensor  # (B,), on the scale of the sampling scheduler
    target: Tensor  # (B, c, h, w)
    weight: Tensor  # (B,)


class Process(Protocol):
    def noise_latents(self, latents: Tensor, noise: Tensor, level: Tensor) -> NoisyBatch: ...
    def scheduler(self) -> SchedulerMixin: ...


class Objective:
    """A noise process and the loss between the network's prediction and its target.

    Args:
        layout: memory format of the network's input.
    """

    def __init__(self, settings: ObjectiveSettings, condition: ConditionSettings, device: str,
                 layout: torch.memory_format = torch.contiguous_format) -> None:
        self.settings, self.condition, self.device, self.layout = settings, condition, device, layout
        self.process = process(settings, device)

    def draw_randomness(self, shape: tuple[int, ...], seed: int, cursor: int, rank: int = 0, world: int = 1,
                        findings: int = 0) -> StepRandomness:
        """This rank's share of the random numbers of the step at `cursor` images, for a global batch (B, c, h, w).

        In a fraction `condition.hide_findings` of the images, each finding is set to unknown with a probability drawn
        per image from U[0, 1), so that every number of known findings is equally likely.
        """
        generator = torch.Generator(self.device).manual_seed(step_seed(seed, cursor))
        batch = shape[0]
        own = share(batch, rank, world)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)[own]

        def uniform(*columns: int) -> Tensor:
            return torch.rand(batch, *columns, generator=generator, device=self.device)[own]

        drop_all = uniform() < self.condition.drop_all
        randomness = StepRandomness(normal(), normal(), uniform(), {
            name: drop_all | (uniform() < getattr(self.condition, f"drop_{name}")) for name in CONDITIONS})
        if not findings or not self.condition.hide_findings:
            return randomness
        rate = uniform() * (uniform() < self.condition.hide_findings)
        return replace(randomness, hidden=uniform(findings) < rate[:, None])

    def losses(self, model: nn.Module, latents: Tensor, conditions: dict[str, Tensor],
               randomness: StepRandomness) -> Tensor:
        """Weighted losses (B,) of the predictions for clean `latents` (B, c, h, w) of unit variance.

        `conditions` are (B, ...) by name.
        """
        if randomness.hidden is not None:
            conditions = conditions | {"labels": conditions["labels"].masked_fill(randomness.hidden, -1)}
        batch = self.process.noise_latents(latents, randomness.noise, randomness.level)
        dtype = next(model.parameters()).dtype
        noisy = batch.noisy.to(dtype, memory_format=self.layout)
        predicted = model(noisy, batch.timesteps, conditions, randomness.dropped).float()
        if self.settings.loss == "huber":
            error = F.huber_loss(predicted, batch.target, reduction="none", delta=self.settings.huber_delta)
        else:
            pointwise = F.mse_loss if self.settings.loss == "l2" else F.l1_loss
            error = pointwise(predicted, batch.target, reduction="none")
        return error.flatten(1).mean(1) * batch.weight


def process(settings: ObjectiveSettings, device: str) -> Process:
    """The noise process of the settings, with its tables on `device`."""
    processes: dict[str, Callable[[ObjectiveSettings, str], Process]] = {
        "diffusion": Diffusion, "edm": Edm, "flow": Flow}
    return processes[settings.process](settings, device)


def _normal_quantiles(settings: ObjectiveSettings, level: Tensor) -> Tensor:
    """Quantiles of the normal distribution behind the noise levels."""
    default = NOISE_LEVELS[settings.process][_distribution(settings)]
    mean = default[0] if settings.level_mean is None else settings.level_mean
    std = default[1] if settings.level_std is None else settings.level_std
    return mean + std * torch.special.ndtri(level.clamp(1e-6, 1 - 1e-6))


def _distribution(settings: ObjectiveSettings) -> str:
    return settings.noise_levels or next(iter(NOISE_LEVELS[settings.process]))


def _noise_fraction(settings: ObjectiveSettings, level: Tensor) -> Tensor:
    """Fraction of noise in [0, 1): uniform, or the sigmoid of a normal (Esser et al. 2024, arXiv 2403.03206)."""
    return level if _distribution(settings) == "uniform" else _normal_quantiles(settings, level).sigmoid()


class Diffusion:
    """Gaussian diffusion in discrete steps (Ho et al. 2020), with zero terminal SNR if the target allows it, so that
    sampling starts from pure noise, as in training, and brightness is unbiased (Lin et al. 2023, arXiv 2305.08891)."""

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

    def noise_latents(self, latents: Tensor, noise: Tensor, level: Tensor) -> NoisyBatch:
        steps = self.settings.timesteps
        timesteps = (_noise_fraction(self.settings, level) * steps).long().clamp(max=steps - 1)
        if self.settings.prediction == "epsilon":
            target = noise
        elif self.settings.prediction == "sample":
            target = latents
        else:
            target = self.training.get_velocity(latents, noise, timesteps)
        return NoisyBatch(self.training.add_noise(latents, noise, timesteps), timesteps, target, self.weight(timesteps))

    def weight(self, timesteps: Tensor) -> Tensor:
        """min-SNR-gamma weights (B,) for the prediction type (Hang et al. 2023, arXiv 2303.09556).

        For v-prediction, one is added to the SNR before clamping, as in diffusers' training examples: the weight then
        does not vanish at zero SNR, where sampling starts.
        """
        if self.settings.min_snr is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = self.snr[timesteps]
        clamped = snr.clamp(max=self.settings.min_snr)
        if self.settings.prediction == "epsilon":
            return clamped / snr.clamp(min=1e-8)
        if self.settings.prediction == "sample":
            return clamped
        return (snr + 1).clamp(max=self.settings.min_snr) / (snr + 1)

    def scheduler(self) -> SchedulerMixin:
        """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) on the schedule used in training, in steps of equal log-SNR.

        In steps of equal time the last one would start at a noise level of about 0.2 and remove finer detail.
        """
        return DPMSolverMultistepScheduler.from_config(self.training.config, algorithm_type="dpmsolver++",
                                                       use_lu_lambdas=True)


class Edm:
    """EDM preconditioning (Karras et al. 2022, arXiv 2206.00364): input, output and loss of unit variance at every
    noise level, whose logarithm is normal."""

    def __init__(self, settings: ObjectiveSettings, device: str) -> None:
        self.settings = settings

    def noise_latents(self, latents: Tensor, noise: Tensor, level: Tensor) -> NoisyBatch:
        sigma = _normal_quantiles(self.settings, level).exp()
        std = sigma.view(-1, 1, 1, 1)
        variance = std.square() + SIGMA_DATA**2
        noisy = latents + std * noise
        skip, out = SIGMA_DATA**2 / variance, std * SIGMA_DATA / variance.sqrt()
        return NoisyBatch(noisy / variance.sqrt(), sigma.log() / 4, (latents - skip * noisy) / out,
                          torch.ones_like(sigma))

    def scheduler(self) -> SchedulerMixin:
        return EDMDPMSolverMultistepScheduler(sigma_min=self.settings.sigma_min, sigma_max=self.settings.sigma_max,
                                              sigma_data=SIGMA_DATA)


class Flow:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): straight paths from data to noise, and their velocity."""

    def __init__(self, settings: ObjectiveSettings, device: str) -> None:
        self.settings = settings

    def noise_latents(self, latents: Tensor, noise: Tensor, level: Tensor) -> NoisyBatch:
        time = _noise_fraction(self.settings, level)
        t = time.view(-1, 1, 1, 1)
        return NoisyBatch((1 - t) * latents + t * noise, time * self.settings.timesteps, noise - latents,
                          torch.ones_like(time))

    def scheduler(self) -> SchedulerMixin:
        """DPM-Solver++ along the straight paths, in steps that are shorter near the data: their detail is fine."""
        return DPMSolverMultistepScheduler(num_train_timesteps=self.settings.timesteps, use_flow_sigmas=True,
                                           flow_shift=FLOW_SHIFT, prediction_type="flow_prediction",
                                           algorithm_type="dpmsolver++", timestep_spacing="trailing")
