"""Training with DeepSpeed, ZeRO stages 0 to 3; each worker exchanges its own part of the state (`sharded_state`).

All state (weights, Adam's moments, EMAs) is held in flat fp32 partitions, one set per worker; under ZeRO 0 in the
parameters themselves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from cluster.session import device
from pipelines.generator.training.checkpoint import MODEL, Layout
from pipelines.generator.training.ema import STORED, Ema, squared_norm
from pipelines.generator.training.settings import TrainerSettings
from pipelines.generator.training.sharded_state import Fragment, Tensors, fill, flattened, fragments
from pipelines.learning.precision import bf16_is_fast

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # largest number of gradients reduced at a time: 100 MB in bf16


class DeepSpeedTrainer:
    """A module and its optimizer on this worker.  Every method but `snapshot` is a collective: all workers call it."""

    def __init__(self, module: nn.Module, settings: TrainerSettings, world: int) -> None:
        deepspeed = _import_deepspeed()
        self.settings, self.world = settings, world
        self.bf16 = settings.precision == "bf16" and bf16_is_fast()
        self.fp16 = settings.precision == "fp16" and torch.cuda.is_available()
        self._clips_gradients = settings.zero_stage < 3 and not settings.offload and not self.fp16
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
        parameters = list(module.parameters())
        self._adam = torch.optim.AdamW(parameters, settings.lr, (0.9, settings.beta2),
                                       weight_decay=settings.weight_decay, fused=True)
        config = self._config(sum(p.numel() for p in parameters))
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self._adam, config=config)
        named = [(names[id(parameter)], parameter) for parameter in self.engine.module.parameters()]
        zero = self.engine.optimizer
        if settings.zero_stage == 0:
            flat = parameters
        else:
            flat = (zero.fp32_partitioned_groups_flat if settings.zero_stage == 3
                    else zero.single_partition_of_fp32_groups)
        self.partitions: list[Tensor] = [partition.detach() for partition in flat]
        self.elements = sum(partition.numel() for partition in self.partitions)
        self.fragments = fragments(settings.zero_stage, torch.distributed.get_rank(), named, self.partitions)
        self._host: Tensors = {}  # vectors of the last snapshot, by part
        self._adam_state = [{"step": torch.zeros((), device=partition.device),
                             **{key: torch.zeros_like(partition) for key in MOMENTS}} for partition in self.partitions]
        self._adam.state.update(zip(flat, self._adam_state, strict=True))
        self.emas = [Ema(self.partitions, length) for length in STORED]
        self._finite = torch.ones((), dtype=torch.bool, device=self.partitions[0].device)
        self._grad_norm = torch.zeros_like(self._finite, dtype=torch.float32)
        self._adam.register_step_pre_hook(self._clip_and_mask)

    @property
    def model(self) -> nn.Module:
        return self.engine

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the last loss of a step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self, lr: float, batch: int, seen: int, finite: Tensor) -> Tensor:
        """One optimizer step over a global batch of `batch` images, which brings the total to `seen`.

        Weights and moments are left unchanged if `finite` (one bool on the device, the same on all workers) is false or
        the gradient is not finite.  Both are tested on the device, without host synchronisation; under ZeRO-3, offload
        and fp16 DeepSpeed tests the gradient itself and synchronises.

        Returns:
            Whether the step was applied, on the device; true also for a step skipped by fp16 loss scaling.
        """
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._finite = finite
        self.engine.step()
        for ema in self.emas:
            ema.update(batch, seen)
        applied = self.fp16 or self.engine.was_step_applied()
        return self._finite if applied else torch.zeros_like(finite)

    def _clip_and_mask(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the gradient by its norm over all workers; set AdamW's `found_inf`, which makes it skip the step."""
        if self._clips_gradients:
            gradients = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
            squared = squared_norm(gradients)
            if self.settings.zero_stage > 0 and self.world > 1:
                torch.distributed.all_reduce(squared)
            self._grad_norm = squared.sqrt()
            torch._foreach_mul_(gradients, (self.settings.grad_clip / (self._grad_norm + 1e-6)).clamp(max=1))
            self._finite = self._finite & torch.isfinite(self._grad_norm)
        skip = (~self._finite).to(self.partitions[0].device, torch.float32)
        adam.found_inf = skip  # type: ignore[attr-defined]

    def _parts(self) -> dict[str, list[Tensor]]:
        """Buffers laid out like the partitions, by their part of a checkpoint."""
        return {MODEL: self.partitions, **{ema.name: ema.averages for ema in self.emas},
                **{key: [state[key] for state in self._adam_state] for key in MOMENTS}}

    def layout(self) -> Layout:
        """What the workers' vectors hold; a collective. Under ZeRO 0 the first one writes, as all hold the same."""
        writes = self.settings.zero_stage > 0 or torch.distributed.get_rank() == 0
        held: list[list[Fragment]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(held, self.fragments if writes else [])
        return Layout(list(self._parts()), self.shapes, held)

    def snapshot(self) -> Tensors:
        """A copy of this worker's state in CPU memory, a vector for each part; the next call overwrites it."""
        if not self._host:
            pinned = torch.cuda.is_available()
            self._host = {part: torch.empty(self.elements, pin_memory=pinned) for part in self._parts()}
        copies = {part: flattened(buffers, self._host[part]) for part, buffers in self._parts().items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def load(self, read: Callable[[str, list[Fragment], int], Tensor], parts: Collection[str], steps: int,
             scaler: dict[str, Any]) -> None:
        """Restore the state and `scaler` saved after `steps` steps; the module already has the weights.

        Args:
            read: the vector (N,) of a part, of this worker's fragments and number N of elements.
            parts: those that were saved.
        """
        for part, buffers in self._parts().items():
            if part in parts:
                fill(buffers, read(part, self.fragments, self.elements))
        for adam in self._adam_state:
            adam["step"].fill_(steps)
        if scaler:
            vars(self.engine.optimizer.loss_scaler).update(scaler)

    def scaler(self) -> dict[str, Any]:
        """State of fp16 loss scaling; empty in other precisions."""
        if not self.fp16:
            return {}
        kept = vars(self.engine.optimizer.loss_scaler)
        return {name: value for name, value in kept.items() if isinstance(value, int | float | bool)}

    def steps(self) -> int:
        """Optimizer steps applied; skipped ones are not counted."""
        return int(self._adam_state[0]["step"].item())

    def norms(self) -> dict[str, float]:
        """Norms of the last gradient before clipping and of the weights, and each EMA's distance relative to these."""
        squares = torch.stack([squared_norm(self.partitions), *(ema.distance() for ema in self.emas)]).to(device())
        if self.settings.zero_stage > 0 and self.world > 1:
            torch.distributed.all_reduce(squares)
        weights, first, *others = squares.sqrt().tolist()
        gradient = self._grad_norm if self._clips_gradients else self.engine.get_global_grad_norm()
        return {"grad_norm": float(gradient), "weight_norm": weights, "ema_distance": first / weights,
                **{f"{ema.name}_distance": distance / weights
                   for ema, distance in zip(self.emas[1:], others, strict=True)}}

    def _config(self, parameters: int) -> dict[str, Any]:
        """DeepSpeed's configuration.

        ZeRO-2 is the default: it fits a UNet or DiT of up to 1 B parameters and is faster than ZeRO-3.

        Some of DeepSpeed's defaults cost a small model a tenth of its speed and are disabled. A single worker uses
        ZeRO-1 for ZeRO-2, as it has no gradients to reduce. The reduce bucket, which is allocated at every step, is no
        larger than the model. DeepSpeed's gradient norm, overflow check and throughput timer synchronise with the
        device at every step; they are disabled where `_clip_and_mask` replaces them. `train_batch_size` is only a
        placeholder: the loop accumulates gradients itself and weights each worker's share.
        """
        settings, alone, cuda = self.settings, self.world == 1, torch.cuda.is_available()
        sharded = settings.zero_stage > 0
        zero: dict[str, Any] = {
            "stage": 1 if alone and settings.zero_stage == 2 and settings.micro_batch is None else settings.zero_stage,
            "contiguous_gradients": not alone, "overlap_comm": cuda,
            "reduce_bucket_size": min(parameters, BUCKET)}
        if settings.zero_stage == 3:
            zero |= {"stage3_param_persistence_threshold": settings.zero3_persistence, "sub_group_size": 10**12}
        if settings.offload:
            zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": cuda}}
        if self._clips_gradients and sharded:
            zero |= {"compute_grad_norm": False}
        return {
            "train_batch_size": self.world,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0 if self._clips_gradients else settings.grad_clip,
            "bf16": {"enabled": sharded and self.bf16, "check_grad_overflow": not self._clips_gradients},
            "fp16": {"enabled": self.fp16},
            "torch_autocast": {"enabled": not sharded and self.bf16, "dtype": "bfloat16"},
            "timers": {"throughput": {"enabled": False}},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }


def _import_deepspeed() -> Any:
    """DeepSpeed, with logging reduced and communication initialised."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # Otherwise DeepSpeed compiles a C++ extension on the first run without a GPU, taking 40 s, 3 GiB and g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo",
                               auto_mpi_discovery=False, verbose=False)
    return deepspeed
