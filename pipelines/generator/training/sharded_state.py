"""Converts flat fp32 partitions to full tensors by parameter name and back, using DeepSpeed's own mapping.

The gathered state depends neither on the ZeRO stage nor on the number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cluster.session import device

Tensors = dict[str, Tensor]


class ShardedState:
    """This worker's partitions of weights, moments and EMAs.  All methods are collectives.

    Args:
        zero_stage: 0 to 3; under ZeRO 0 partitions are the parameters themselves.
        world: number of workers.
        named: all parameters of the module as held by DeepSpeed, by name.
        partitions: fp32 weights that this worker owns, on its device.
    """

    def __init__(self, zero_stage: int, world: int, named: Sequence[tuple[str, nn.Parameter]],
                 partitions: list[Tensor]) -> None:
        self.zero_stage, self.world, self.named, self.partitions = zero_stage, world, named, partitions

    def gather(self, buffers: list[Tensor]) -> Tensors:
        """Full tensors in CPU memory of buffers shaped like the partitions, on rank 0; {} on the others."""
        first = torch.distributed.get_rank() == 0
        if self.zero_stage == 0:
            named = zip(self.named, buffers, strict=True) if first else ()
            return {name: buffer.to("cpu", copy=True) for (name, _), buffer in named}
        if self.zero_stage == 3:
            return self._gather_sharded_weights(buffers, first)
        return self._gather_fragments(buffers, first)

    def scatter(self, buffers: list[Tensor], tensors: Tensors) -> None:
        """Fill buffers shaped like the partitions from full tensors, which every rank has."""
        from deepspeed.utils import safe_set_full_fp32_param

        if self.zero_stage == 0:
            for (name, _), buffer in zip(self.named, buffers, strict=True):
                buffer.copy_(tensors[name])
            return
        with self._swapped_in(buffers):
            for name, parameter in self.named:
                safe_set_full_fp32_param(parameter, tensors[name].to(self.partitions[0].device))
            if buffers is not self.partitions:
                torch._foreach_copy_(buffers, self.partitions)

    def _gather_fragments(self, buffers: list[Tensor], first: bool) -> Tensors:
        """ZeRO 1 and 2, with one collective: every worker copies its fragments into a vector of all parameters."""
        [buffer] = buffers  # one parameter group, one partition
        sizes = [parameter.numel() for _, parameter in self.named]
        full = torch.zeros(sum(sizes), device=device())
        for flat, (_, parameter) in zip(full.split(sizes), self.named, strict=True):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                target, source = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat.narrow(0, target.start, target.numel).copy_(buffer.narrow(0, source.start, source.numel))
        if self.world > 1:
            torch.distributed.reduce(full, 0)
        if not first:
            return {}
        return {name: flat.to("cpu", copy=True).view(parameter.shape)
                for flat, (name, parameter) in zip(full.split(sizes), self.named, strict=True)}

    def _gather_sharded_weights(self, buffers: list[Tensor], first: bool) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensors = {}
        with self._swapped_in(buffers):
            for name, parameter in self.named:
                tensor = safe_get_full_fp32_param(parameter)
                if first:
                    full[name] = tensor.to("cpu", copy=True)
        return full

    @contextlib.contextmanager
    def _swapped_in(self, buffers: list[Tensor]) -> Iterator[None]:
        """Within the block, the fp32 weights that DeepSpeed sees are replaced by `buffers`."""
        if buffers is self.partitions:
            yield
            return
        weights = [partition.clone() for partition in self.partitions]
        torch._foreach_copy_(self.partitions, buffers)
        try:
            yield
        finally:
            torch._foreach_copy_(self.partitions, weights)
