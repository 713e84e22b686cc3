"""DeepSpeed: the one module that knows it. ZeRO 1 to 3 behind whole, named tensors.

All state (weights, Adam's moments, the EMA) lives in flat fp32 partitions, one set per worker. `gather` turns any of
them into whole tensors by parameter name and `scatter` does the reverse, both through DeepSpeed's own map from
parameters to partitions. Checkpoints therefore do not depend on the ZeRO stage or on the number of workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipelines.generator.ema import Ema
from pipelines.generator.fit import BETAS, bf16_is_fast
from pipelines.settings import Trainer

Tensors = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # gradients reduced at a time, at most: 100 MB in bf16


class Engine:
    """A module under training on this worker.  All methods are collectives: every worker calls them."""

    def __init__(self, module: nn.Module, settings: Trainer, world: int) -> None:
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed

        # Else DeepSpeed compiles a C++ extension on the first run of a machine without GPUs: 40 s, 3 GiB, and g++.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo",
                                   auto_mpi_discovery=False, verbose=False)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        optimizer = torch.optim.AdamW(module.parameters(), settings.lr, weight_decay=settings.weight_decay,
                                      betas=BETAS, fused=True)
        config = deepspeed_config(settings, world, sum(p.numel() for p in module.parameters()))
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._named = [(names[id(parameter)], parameter) for parameter in self.engine.module.parameters()]
        zero = self.engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if settings.zero_stage == 3 else zero.single_partition_of_fp32_groups
        self.partitions: list[Tensor] = [partition.detach() for partition in flat]
        self._adam = zero.optimizer
        self._adam_state = [{"step": torch.zeros((), device=partition.device),
                             **{key: torch.zeros_like(partition) for key in MOMENTS}} for partition in self.partitions]
        self._adam.state.update(zip(flat, self._adam_state, strict=True))
        self.ema = Ema(self.partitions, settings.ema_halflife_images)

    @property
    def module(self) -> nn.Module:
        return self.engine

    def step(self, loss: Tensor, lr: float, batch: int, seen: int) -> None:
        """One optimisation step of a global batch of `batch` images, which makes `seen` in all."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self.engine.backward(loss)
        self.engine.step()
        self.ema.update(batch, seen)

    def state(self) -> dict[str, Tensors]:
        """All state as whole fp32 tensors on the host: model, ema, exp_avg and exp_avg_sq, each by parameter name.

        On rank 0 only: the other workers get empty tables, for one copy on the host is enough.
        """
        moments = {key: self._gather([state[key] for state in self._adam_state]) for key in MOMENTS}
        return {"model": self._gather(self.partitions), "ema": self._gather(self.ema.averages), **moments}

    def load(self, state: dict[str, Tensors], steps: int) -> None:
        """Take over what `state` gave after `steps` steps; the module must have been built with its weights."""
        self._scatter(self.partitions, state["model"])
        self._scatter(self.ema.averages, state["ema"])
        for key in MOMENTS:
            self._scatter([adam[key] for adam in self._adam_state], state[key])
        for adam in self._adam_state:
            adam["step"].fill_(steps)

    def ema_distance(self) -> float:
        """Norm of EMA minus weights over the norm of the weights, over all workers."""
        parts = torch.stack(self.ema.distance())
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(parts)
        return (parts[0] / parts[1]).sqrt().item()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all workers, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def _gather(self, buffers: list[Tensor]) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Tensors = {}
        with self._in_place_of_weights(buffers):
            for name, parameter in self._named:
                tensor = safe_get_full_fp32_param(parameter)
                if torch.distributed.get_rank() == 0:
                    whole[name] = tensor.cpu().clone()
        return whole

    def _scatter(self, buffers: list[Tensor], tensors: Tensors) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        with self._in_place_of_weights(buffers):
            for name, parameter in self._named:
                safe_set_full_fp32_param(parameter, tensors[name].to(self.partitions[0].device))
            if buffers is not self.partitions:
                torch._foreach_copy_(buffers, self.partitions)

    @contextlib.contextmanager
    def _in_place_of_weights(self, buffers: list[Tensor]) -> Iterator[None]:
        """Within the block DeepSpeed sees `buffers` where the fp32 weights are."""
        if buffers is self.partitions:
            yield
            return
        weights = [partition.clone() for partition in self.partitions]
        torch._foreach_copy_(self.partitions, buffers)
        yield
        torch._foreach_copy_(self.partitions, weights)


def deepspeed_config(settings: Trainer, world: int, parameters: int) -> dict:
    """ZeRO-2 by default: a UNet or DiT of up to 1 B parameters fits, and it is the faster of 2 and 3.

    Three of DeepSpeed's habits cost a small model a tenth of its speed and are left out. A lone worker shares its
    gradients with none, so that stage 2 is stage 1 and needs no bucket to reduce them from. The bucket, allocated anew
    at every step, is no larger than the model. A bf16 gradient has the range of fp32's and is not searched for
    overflows, which would skip steps in silence; `Log` stops at a loss that is not finite.
    """
    alone = world == 1
    zero: dict = {"stage": 1 if alone and settings.zero_stage == 2 else settings.zero_stage,
                  "contiguous_gradients": not alone, "overlap_comm": torch.cuda.is_available(),
                  "reduce_bucket_size": min(parameters, BUCKET)}
    if settings.zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": settings.zero3_persistence, "sub_group_size": 10**12}
    return {
        "train_batch_size": settings.batch,
        "train_micro_batch_size_per_gpu": settings.batch // world,
        "gradient_clipping": settings.grad_clip,
        "bf16": {"enabled": settings.precision == "bf16" and bf16_is_fast(), "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
