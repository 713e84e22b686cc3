"""`make roofline`: the MFU of large denoisers on an H100, predicted from counted calls, FLOPs and bytes.

A prediction, not a measurement. Forward and backward pass run on meta tensors, where every ATen call is counted. A call
takes as long as its products or its memory traffic, whichever is slower; a pass takes as long as the sum, or as
launching its calls, whichever is slower. Compiled blocks are taken to fuse all that is neither a product nor a
normalisation.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipelines.generator.denoiser.network import build_denoiser
from pipelines.generator.training.interval_log import PEAK
from pipelines.graph.compose import load_settings

NETWORKS = {"unet-60m": (4, 16, 16), "unet-300m": (4, 32, 32), "dit-l": (4, 32, 32), "unet-860m": (4, 64, 64)}
MICRO_BATCHES = (32, 128)
H100 = PEAK["H100"] * 1e12  # FLOP/s
PRODUCTS, BANDWIDTH = 0.6 * H100, 0.8 * 3.35e12  # reached by large products and by copies: FLOP/s, bytes/s
LAUNCH = 5e-6  # seconds of the CPU per call, of PyTorch's dispatcher and autograd
ALONE = ("norm", "attention")  # in the names of calls that stay kernels of their own when compiled


class Roofline(TorchDispatchMode):
    """Sums the seconds of every call on the device, by whether compiling would leave it a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seconds, self.flops = Counter[bool](), Counter[bool](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, outputs)) if isinstance(leaf, torch.Tensor)]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            packet = function._overloadpacket
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=outputs) if packet in flop_registry else 0
            stays = flops > 0 or any(word in str(packet) for word in ALONE)
            self.calls[stays] += 1
            self.seconds[stays] += max(flops / PRODUCTS, moved / BANDWIDTH)
            self.flops += flops
        return outputs


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """What a GPU uses; meta tensors would take the attention that stores every pair."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def count(name: str, latent: tuple[int, int, int], batch: int) -> Roofline:
    """One forward and one backward pass in bfloat16."""
    settings = load_settings("profile=demo", f"denoiser={name}")
    with torch.device("meta"):
        model = build_denoiser(settings.denoiser, settings.condition, latent, {"embedding": (768,)}, []).bfloat16()
        conditions = {"embedding": torch.zeros(batch, 768), "labels": torch.zeros(batch, 0)}
        latents, timesteps = torch.zeros(batch, *latent, dtype=torch.bfloat16), torch.zeros(batch)
        dropped = {name: torch.zeros(batch, dtype=torch.bool) for name in conditions}
        with Roofline() as counted, patch.object(torch.nn.functional, "scaled_dot_product_attention", flash_attention):
            model(latents, timesteps, conditions, dropped).float().square().mean().backward()
    return counted


def main() -> None:
    print("| denoiser | latent | micro-batch | calls | GFLOP per image | predicted MFU | compiled |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, latent in NETWORKS.items():
        for batch in MICRO_BATCHES:
            counted = count(name, latent, batch)
            least = counted.flops / H100
            eager = least / max(counted.calls.total() * LAUNCH, counted.seconds.total())
            compiled = least / max(counted.calls[True] * LAUNCH, counted.seconds[True])
            print(f"| `{name}` | {'x'.join(map(str, latent))} | {batch} | {counted.calls.total():,} | "
                  f"{counted.flops / batch / 1e9:,.0f} | {eager:.0%} | {compiled:.0%} |", flush=True)


if __name__ == "__main__":
    main()
