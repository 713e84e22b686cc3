"""One resumable training loop for the small networks that fit one device: autoencoder, encoder, classifier."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cluster.session import device
from cluster.storage import Folder
from pipelines.data.order import Order, batches
from pipelines.progress import Journal
from pipelines.settings import Fitting, Trainer

Loss = Callable[[np.ndarray, float], dict[str, Tensor]]
CHECKPOINT = "fit.pt"
BETAS = (0.9, 0.99)  # runs of a few thousand steps at most
WARMUP_FRACTION = 0.05
LOG_SECONDS = 5.0


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


def step_seed(seed: int, cursor: int) -> int:
    """Seed of all randomness of the step at `cursor` images: a resumed run draws what an unbroken one does."""
    return int(np.random.SeedSequence([seed, cursor]).generate_state(1, np.uint64)[0] >> 1)


def warmup_cosine(progress: float, warmup: float, final: float) -> float:
    """Learning-rate factor at `progress` of the run, both in [0, 1]: linear warm-up, then cosine to `final`."""
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9))) / 2


def learning_rate(settings: Trainer, seen: int) -> float:
    """Of the step that begins at `seen` images: linear warm-up, then the schedule of the settings.

    inverse_sqrt is EDM2's: constant up to `decay_after_images`, then falling with the root of the images seen.
    """
    if settings.schedule == "cosine":
        warmup = min(settings.warmup_images / settings.images, 1)
        return settings.lr * warmup_cosine(seen / settings.images, warmup, settings.final_lr_fraction)
    rate = settings.lr if seen >= settings.warmup_images else settings.lr * seen / settings.warmup_images
    if settings.schedule == "inverse_sqrt":
        rate /= math.sqrt(max(seen / settings.decay_after_images, 1))
    return rate


def fit(module: nn.Module, loss: Loss, settings: Fitting, n: int, seed: int, folder: Folder) -> None:
    """Train `module` for `settings.total(n)` images out of `n`, going on from the folder's checkpoint if there is one.

    Args:
        module: All that is trained or kept in step with it; parameters that need no gradient are saved, not optimised.
        loss: From the indices of a batch and the progress in [0, 1] to named scalars; "loss" is minimised.
        folder: Takes the checkpoint and metrics.jsonl.

    Raises:
        FloatingPointError: The loss is no finite number.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, betas=BETAS, weight_decay=settings.weight_decay, fused=True)
    cursor, total = 0, settings.total(n)
    if folder.exists(CHECKPOINT):
        state = torch.load(io.BytesIO(folder.read(CHECKPOINT)), weights_only=True, map_location=device())
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        cursor = state["cursor"]
    journal = Journal(folder, cursor)
    order = Order(n, seed)
    saved = logged = time.monotonic()
    for start, stop in batches(total, settings.batch, cursor):
        torch.manual_seed(step_seed(seed, start))
        progress = start / total
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warmup_cosine(progress, WARMUP_FRACTION, 0.01)
        with autocast():
            values = loss(order.indices(start, stop), progress)
        values["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        save = now - saved > settings.checkpoint_seconds or stop == total
        if save or now - logged > LOG_SECONDS:
            logged = now
            numbers = {name: value.item() for name, value in values.items()}
            if not math.isfinite(numbers["loss"]):
                raise FloatingPointError(f"the loss is {numbers['loss']} at {stop} images; lower the learning rate")
            journal.log(stop, **numbers)
        if save:  # only what was just found finite
            saved = now
            buffer = io.BytesIO()
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "cursor": stop}, buffer)
            folder.write(CHECKPOINT, buffer.getvalue())
