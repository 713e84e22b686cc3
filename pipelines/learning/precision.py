"""The number formats that this process computes fast in, and images on their way to its device."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from cluster.session import device


def bf16_is_fast() -> bool:
    """Whether this process's hardware multiplies bfloat16."""
    return torch.cuda.is_available() or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast() -> contextlib.AbstractContextManager:
    """bfloat16 where it is fast; float32 elsewhere."""
    return torch.autocast(device(), torch.bfloat16) if bf16_is_fast() else contextlib.nullcontext()


def to_device(images: np.ndarray, where: str) -> Tensor:
    """uint8 images on the host to float32 in [0, 1] on the device."""
    return torch.from_numpy(images).to(where, non_blocking=True).float() / 255
