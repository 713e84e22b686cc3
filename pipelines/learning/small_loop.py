"""Resumable training loop of the small networks that fit on one device: autoencoder, encoder, classifier."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cluster.session import device
from cluster.storage import Folder
from pipelines.learning.order import step_seed
from pipelines.learning.precision import autocast, use_tensor_cores
from pipelines.learning.readers import Batch, Reader
from pipelines.learning.schedule import warmup_cosine
from pipelines.learning.settings import SmallTrainingSettings
from pipelines.monitor.journal import Journal

Loss = Callable[[Batch, float], dict[str, Tensor]]
CHECKPOINT = "checkpoint.pt"
WARMUP_FRACTION = 0.05
LOG_SECONDS = 5.0


def train_small_network(module: nn.Module, loss: Loss, settings: SmallTrainingSettings, reader: Reader, seed: int,
                        folder: Folder) -> None:
    """Train `module` for `settings.training_images(reader.n)` images, resuming from the folder's checkpoint if any.

    Args:
        module: everything that is trained or checkpointed; parameters with requires_grad=False are only checkpointed.
        loss: maps a batch and the progress in [0, 1] to named scalars; "loss" is minimised.
        reader: of the training images.
        folder: for the checkpoint and metrics.jsonl.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    use_tensor_cores()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, (0.9, settings.beta2), weight_decay=settings.weight_decay,
                                  fused=True)
    cursor, total = 0, settings.training_images(reader.n)
    if folder.exists(CHECKPOINT):
        state = torch.load(io.BytesIO(folder.read(CHECKPOINT)), weights_only=True, map_location=device())
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        cursor = state["cursor"]
    journal = Journal(folder, cursor)
    saved = logged = time.monotonic()
    for batch in reader.batches(total, settings.batch, cursor):
        torch.manual_seed(step_seed(seed, batch.start))
        progress = batch.start / total
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warmup_cosine(progress, WARMUP_FRACTION, 0.01)
        with autocast():
            values = loss(batch, progress)
        values["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        save = now - saved > settings.checkpoint_seconds or batch.stop == total
        if save or now - logged > LOG_SECONDS:
            logged = now
            numbers = {name: value.item() for name, value in values.items()}
            if not math.isfinite(numbers["loss"]):
                raise FloatingPointError(f"the loss is {numbers['loss']} at {batch.stop} images; "
                                         "lower the learning rate")
            journal.log(batch.stop, **numbers)
        if save:  # only after the check above
            saved = now
            buffer = io.BytesIO()
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "cursor": batch.stop},
                       buffer)
            folder.write(CHECKPOINT, buffer.getvalue())
