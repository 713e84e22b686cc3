"""The baseline of the training benches: what a careful user of PyTorch would write by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.generator.denoiser.objective import Objective, StepRandomness
from pipelines.learning.precision import autocast


class Bare:
    """Autocast, fused AdamW, clipping and one average of the weights, around any module, also a wrapped one."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model, self.objective = model, objective
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        self.average = [p.detach().clone() for p in model.parameters()]

    def step(self, latents: Tensor, conditions: dict[str, Tensor], draw: StepRandomness) -> None:
        with autocast():
            loss = self.objective.losses(self.model, latents, conditions, draw).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 0.01)
