"""Where the elements of every parameter lie in each worker's flat fp32 buffers, by DeepSpeed's own mapping.

Weights, moments and EMAs of a worker are laid out alike. What one number of workers wrote under one ZeRO stage can
therefore be read under any other, each worker reading its own elements only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Fragment(NamedTuple):
    """Consecutive elements of one parameter in a worker's buffers."""

    name: str  # of the parameter
    start: int  # first element, in the flattened parameter
    offset: int  # first element, in the worker's buffers laid end to end
    numel: int


def fragments(zero_stage: int, rank: int, named: Sequence[tuple[str, nn.Parameter]],
              partitions: Sequence[Tensor]) -> list[Fragment]:
    """The fragments that this worker holds.

    Args:
        zero_stage: 0 to 3; under ZeRO 0 partitions are the parameters themselves.
        named: all parameters of the module as held by DeepSpeed, by name.
        partitions: fp32 weights that this worker owns.
    """
    starts = [0]
    for partition in partitions:
        starts.append(starts[-1] + partition.numel())
    held = []
    for index, (name, parameter) in enumerate(named):
        if zero_stage == 0:
            held.append(Fragment(name, 0, starts[index], parameter.numel()))
        elif zero_stage == 3:
            optimizer, whole = parameter._z3_optimizer, parameter.ds_numel  # type: ignore[attr-defined]
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = min(rank * numel, whole)  # the last ranks hold padding
            held.append(Fragment(name, start, starts[group] + offset, min(numel, whole - start)))
        elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            target, source = mapping.lp_fragment_address, mapping.hp_fragment_address
            held.append(Fragment(name, target.start, source.start, target.numel))
    return [fragment for fragment in held if fragment.numel]


def flattened(buffers: Sequence[Tensor], host: Tensor) -> Tensor:
    """Copies buffers end to end into `host` (N,) in CPU memory, without waiting for the copies."""
    for part, buffer in zip(host.split([b.numel() for b in buffers]), buffers, strict=True):
        part.copy_(buffer.flatten(), non_blocking=True)
    return host


@torch.no_grad()
def fill(buffers: Sequence[Tensor], flat: Tensor) -> None:
    """Copies a vector (N,) in CPU memory into buffers, end to end."""
    for part, buffer in zip(flat.split([b.numel() for b in buffers]), buffers, strict=True):
        buffer.copy_(part.view(buffer.shape))
