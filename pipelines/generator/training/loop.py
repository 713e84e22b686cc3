"""The training loop of one worker.

It is a function of (settings, seed, images seen): a run that is killed and started again, on any number of workers and
under any ZeRO stage, goes on from its last checkpoint to the result of an unbroken one.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.denoiser.network import Denoiser, build, compile_blocks, training_flops
from pipelines.generator.denoiser.objective import Draw, Objective
from pipelines.generator.latents.dataset import Batch, Reader
from pipelines.generator.latents.feed import StreamPlan
from pipelines.generator.latents.spec import LatentSpec
from pipelines.generator.training.checkpoint import Cursor
from pipelines.generator.training.deepspeed import Engine
from pipelines.generator.training.metrics import Meter, finite_everywhere
from pipelines.generator.training.sharded_state import Tensors
from pipelines.generator.training.skipped import FILE, Skipped
from pipelines.graph.settings import Settings
from pipelines.learning.schedule import learning_rate
from pipelines.monitor.journal import Journal

Save = Callable[[Engine, Cursor, int], None]  # the last: images at the checkpoint before


@dataclass(frozen=True)
class Job:
    """What a training worker needs to know."""

    settings: Settings
    fingerprint: str
    folder: Folder  # of the train stage
    latents: Folder
    stream: StreamPlan | None  # where images are streamed
    latents_mean: list[float]  # per channel
    latents_std: list[float]

    def denoiser(self, spec: LatentSpec) -> Denoiser:
        """A fresh network for these latents; the same wherever it is built."""
        torch.manual_seed(self.settings.seed)
        return build(self.settings.denoiser, self.settings.condition, spec.latent, spec.shapes, spec.labels,
                     spec.structures)

    def normaliser(self, device: str) -> Callable[[Tensor], Tensor]:
        """A function that brings latents (B, c, h, w) on the device to mean 0 and variance 1 by channel."""
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.latents_mean, self.latents_std))
        return lambda latents: (latents - mean) / std


def learn(job: Job, spec: LatentSpec, reader: Reader, rank: int, world: int, state: dict[str, Tensors],
          cursor: Cursor, save: Save, leaving: Callable[[], bool]) -> str | None:
    """Train from `cursor` to the end of the settings.

    Args:
        spec: of the latents.
        reader: of the train split, cached or streamed.
        state: of the checkpoint at `cursor`; empty at the start.
        save: keeps a checkpoint; a collective.
        leaving: whether this node is about to be taken away; a collective.

    Returns:
        Why training stopped before its end, or None.
    """
    settings, trainer, where = job.settings, job.settings.trainer, device()
    denoiser = job.denoiser(spec)
    flops = training_flops(denoiser, spec.latent)
    if state:
        denoiser.load_state_dict(state["model"])
    if trainer.activation_checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    if trainer.compile:
        compile_blocks(denoiser.network)
    engine = Engine(denoiser, trainer, world)
    if state:
        engine.load(state, cursor.steps, cursor.scaler)
        state.clear()
    layout = torch.channels_last if trainer.channels_last else torch.contiguous_format
    objective = Objective(settings.objective, settings.condition, where, layout)
    normalise = job.normaliser(where)
    skipped = Skipped(job.folder, reader, cursor.images, writes=rank == 0)
    journal = Journal(job.folder, cursor.images) if rank == 0 else None
    meter = Meter(journal, world, flops, trainer.images, where)
    saved, left = cursor.images, False
    with profiler(job.folder, trainer.profile_steps if rank == 0 else 0) as profile, manual_gc() as collect:
        for batch in reader.batches(trainer.images, trainer.batch, cursor.images, rank, world, where):
            draw = objective.draw((len(batch), *spec.latent), settings.seed, batch.start, rank, world,
                                  findings=len(spec.labels))
            losses = accumulate(engine, objective, batch, draw, normalise, world)
            lr = learning_rate(trainer, batch.start)
            taken = engine.step(lr, len(batch), batch.stop, finite_everywhere(losses, world))
            skipped.add(batch, taken)
            meter.add(losses, draw.level, len(batch))
            profile()
            save_now = batch.stop == trainer.images or batch.crosses(trainer.checkpoint_every)
            if save_now or batch.crosses(trainer.log_every):
                count = skipped.settle()
                meter.write(batch.stop, reader.waited, engine.norms(), lr=lr, skipped=count)
                if count > trainer.max_skipped_batches:
                    return (f"loss or gradient were no finite numbers in {count} batches, the last of them before "
                            f"{batch.stop:,} images; their image_ids are in {job.folder.uri}/{FILE}. Lower trainer.lr, "
                            "or take the images out; trainer.max_skipped_batches says how many may be")
                leave = leaving()
                save_now |= leave and not left
                left = leave
            if save_now:
                begun = time.perf_counter()
                save(engine, Cursor(batch.stop, engine.steps(), job.fingerprint, engine.scaler()), saved)
                saved = batch.stop
                meter.stalled += time.perf_counter() - begun
            collect(save_now)
    return None


def accumulate(engine: Engine, objective: Objective, batch: Batch, draw: Draw, normalise: Callable[[Tensor], Tensor],
               world: int) -> Tensor:
    """Gradients of this worker's share of a batch, in as many passes as every worker needs.

    Returns:
        The losses (B,) of the share.
    """
    images, micro = len(batch.mean), engine.settings.micro_batch
    most = -(-len(batch) // world)  # images of the largest share
    passes = -(-most // micro) if micro else 1
    losses = []
    for k in range(passes):
        part = slice(k * images // passes, (k + 1) * images // passes)
        drawn = draw.rows(part)
        latents = batch.mean[part]
        if batch.logvar is not None:
            latents = latents + (0.5 * batch.logvar[part]).exp() * drawn.posterior
        latents = normalise(latents)
        given = {name: value[part] for name, value in batch.given.items()}
        found = objective.losses(engine.module, latents, given, drawn)
        engine.backward(found.sum() * (world / len(batch)), last=k == passes - 1)
        losses.append(found.detach())
    return torch.cat(losses)


@contextlib.contextmanager
def manual_gc() -> Iterator[Callable[[bool], None]]:
    """Collect garbage where no other worker waits for this one: what is yielded is called after every step."""
    frozen = False

    def collect(now: bool) -> None:
        nonlocal frozen
        if not frozen:
            gc.collect()
            gc.freeze()
            gc.disable()
            frozen = True
        elif now:
            gc.collect(1)

    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def profiler(folder: Folder, steps: int) -> Iterator[Callable[[], None]]:
    """Trace `steps` steps, after ten others, into profile/trace.json; what is yielded is called after every step."""
    if not steps:
        yield lambda: None
        return
    import tempfile
    from pathlib import Path

    from torch.profiler import ProfilerActivity, profile, schedule

    def keep(found: profile) -> None:
        with tempfile.TemporaryDirectory() as aside:
            found.export_chrome_trace(str(Path(aside) / "trace.json"))
            (folder / "profile").upload(aside)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, schedule=schedule(wait=8, warmup=2, active=steps, repeat=1),
                 on_trace_ready=keep) as found:
        yield found.step
