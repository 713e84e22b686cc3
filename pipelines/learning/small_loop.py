"""One resumable training loop for the small networks that fit one device: autoencoder, encoder, classifier."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cluster.session import device
from cluster.storage import Folder
from pipelines.learning.order import Order, batches, step_seed
from pipelines.learning.precision import autocast
from pipelines.learning.schedule import warmup_cosine
from pipelines.learning.settings import Fitting
from pipelines.monitor.journal import Journal

Loss = Callable[[np.ndarray, float], dict[str, Tensor]]
CHECKPOINT = "fit.pt"
WARMUP_FRACTION = 0.05
LOG_SECONDS = 5.0


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
    optimizer = torch.optim.AdamW(trained, settings.lr, (0.9, settings.beta2), weight_decay=settings.weight_decay,
                                  fused=True)
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
