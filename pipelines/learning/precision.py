"""Mixed precision on this process's hardware, and transfer of images to its device."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from cluster.session import device


def bf16_is_fast() -> bool:
    """Whether the hardware supports bfloat16 matrix products."""
    return torch.cuda.is_available() or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast() -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 if it is fast; else float32."""
    return torch.autocast(device(), torch.bfloat16) if bf16_is_fast() else contextlib.nullcontext()


def to_device(images: np.ndarray, where: str) -> Tensor:
    """uint8 images in CPU memory to float32 in [0, 1] on the device."""
    return torch.from_numpy(images).to(where, non_blocking=True).float() / 255
