"""Mixed precision on this process's hardware, and transfer of images to its device."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from cluster.session import device


def bf16_is_fast() -> bool:
    """Whether this process's hardware has units for bfloat16 matrix products: a GPU from Ampere on, a CPU with AMX.

    On CPUs with AVX-512 only, these networks train 1.5 to 2 times faster in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def use_tensor_cores() -> None:
    """On a GPU: float32 products in TF32, and for each convolution the algorithm that is measured fastest."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def autocast() -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 if it is fast; else float32."""
    return torch.autocast(device(), torch.bfloat16) if bf16_is_fast() else contextlib.nullcontext()


def to_device(images: np.ndarray, where: str) -> Tensor:
    """uint8 images in CPU memory to float32 in [0, 1] on the device."""
    return torch.from_numpy(images).to(where, non_blocking=True).float() / 255
