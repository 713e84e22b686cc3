"""The training loop of one worker.

It is a function of (settings, seed, images seen): a run that is killed and restarted, on any number of workers and
under any ZeRO stage, resumes from its last checkpoint and reaches the same result as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.denoiser.network import Denoiser, build_denoiser, compile_blocks, training_flops
from pipelines.generator.denoiser.objective import Objective, StepRandomness
from pipelines.generator.latents.dataset import LatentBatch, LatentReader
from pipelines.generator.latents.feed import StreamPlan
from pipelines.generator.latents.spec import LatentSpec
from pipelines.generator.training import checkpoint
from pipelines.generator.training.checkpoint import Cursor
from pipelines.generator.training.deepspeed import DeepSpeedTrainer
from pipelines.generator.training.interval_log import IntervalLogger, everywhere, finite_everywhere
from pipelines.generator.training.schedule import learning_rate
from pipelines.generator.training.skipped import FILE, SkippedBatches
from pipelines.graph.settings import Settings
from pipelines.learning.precision import use_tensor_cores
from pipelines.monitor.journal import Journal

Save = Callable[[DeepSpeedTrainer, Cursor, int], None]  # the int: images at the previous checkpoint


@dataclass(frozen=True)
class TrainingSpec:
    """The parameters of a training worker."""

    settings: Settings
    fingerprint: str
    folder: Folder  # of the train stage
    latents: Folder
    stream: StreamPlan | None  # with trainer.reader=stream
    latents_mean: list[float]  # per channel
    latents_std: list[float]
    published: dict[str, Any] | None = None  # config of the UNet that denoiser.pretrained names

    @property
    def start(self) -> Folder:
        """The checkpoint with the weights of the published UNet."""
        return self.folder / "start"

    def denoiser(self, latent_spec: LatentSpec) -> Denoiser:
        """A newly initialised network for these latents; the same on every worker."""
        torch.manual_seed(self.settings.seed)
        return build_denoiser(self.settings.denoiser, self.settings.condition, latent_spec.latent, latent_spec.shapes,
                              latent_spec.labels, latent_spec.structures, self.published)

    def normaliser(self, device: str) -> Callable[[Tensor], Tensor]:
        """A function that normalises latents (B, c, h, w) on the device to mean 0 and variance 1 per channel."""
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.latents_mean, self.latents_std))
        return lambda latents: (latents - mean) / std


def run_training_loop(spec: TrainingSpec, latent_spec: LatentSpec, reader: LatentReader, rank: int, world: int,
                      resumed: Folder | None, save: Save, is_preempted: Callable[[], bool]) -> str | None:
    """Train to `trainer.images`.

    Args:
        reader: the train split, cached or streamed.
        resumed: the checkpoint to resume from; None at the start.
        save: writes a checkpoint; a collective.
        is_preempted: whether this node is about to be preempted; a collective.

    Returns:
        Why training stopped early, or None.
    """
    settings, trainer, where = spec.settings, spec.settings.trainer, device()
    if trainer.precision != "fp32":
        use_tensor_cores()
    denoiser = spec.denoiser(latent_spec)
    flops = training_flops(denoiser, latent_spec.latent)
    cursor = Cursor(0, 0, spec.fingerprint)
    start = resumed or (spec.start if spec.published else None)
    if start:
        cursor = checkpoint.check_fingerprint(start, spec.fingerprint)
        if rank == 0:  # whose weights DeepSpeed broadcasts
            denoiser.load_state_dict(checkpoint.read_part(start, checkpoint.MODEL))
    if trainer.activation_checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    if trainer.compile:
        compile_blocks(denoiser.network)
    engine = DeepSpeedTrainer(denoiser, trainer, world)
    if start:
        saved_layout = checkpoint.read_layout(start)
        engine.load(functools.partial(checkpoint.read_vector, start, saved_layout), saved_layout.parts, cursor.steps,
                    cursor.scaler)
    layout = torch.channels_last if trainer.channels_last else torch.contiguous_format
    objective = Objective(settings.objective, settings.condition, where, layout)
    normalise = spec.normaliser(where)
    skipped = SkippedBatches(spec.folder, reader, cursor.images, is_writer=rank == 0)
    journal = Journal(spec.folder, cursor.images) if rank == 0 else None
    log = IntervalLogger(journal, world, flops, trainer.images, where)
    saved, saved_at, due, was_preempted = cursor.images, time.monotonic(), False, False
    with profiler(spec.folder, trainer.profile_steps if rank == 0 else 0) as profile, manual_gc() as collect:
        for batch in reader.batches(trainer.images, trainer.batch, cursor.images, rank, world, where):
            randomness = objective.draw_randomness((len(batch), *latent_spec.latent), settings.seed, batch.start, rank,
                                                   world, findings=len(latent_spec.labels))
            losses = accumulate(engine, objective, batch, randomness, normalise, world)
            lr = learning_rate(trainer, batch.start)
            applied = engine.step(lr, len(batch), batch.stop, finite_everywhere(losses, world))
            skipped.add(batch, applied)
            log.add(losses, randomness.level, len(batch))
            profile()
            last, every = batch.stop == trainer.images, batch.crosses(trainer.checkpoint_every)
            snapshot = batch.crosses(trainer.snapshot_every)
            due, save_now = due or every, last or snapshot
            if save_now or every or batch.crosses(trainer.log_every):
                count = skipped.flush()
                log.write(batch.stop, reader.waited, engine.norms(), lr=lr, skipped=count)
                if count > trainer.max_skipped_batches:
                    return (f"non-finite loss or gradient in {count} batches, the last before {batch.stop:,} images; "
                            f"their image ids are in {spec.folder.uri}/{FILE}. Lower trainer.lr, remove these images, "
                            "or raise trainer.max_skipped_batches")
                preempted = is_preempted()
                save_now |= preempted and not was_preempted
                if due and not save_now:
                    save_now = everywhere(time.monotonic() - saved_at >= trainer.checkpoint_seconds, world)
                was_preempted = preempted
            if save_now:
                before = time.perf_counter()
                save(engine, Cursor(batch.stop, engine.steps(), spec.fingerprint, engine.scaler()), saved)
                saved, saved_at, due = batch.stop, time.monotonic(), False
                log.checkpoint_stall_seconds += time.perf_counter() - before
            collect(save_now)
    return None


def accumulate(engine: DeepSpeedTrainer, objective: Objective, batch: LatentBatch, randomness: StepRandomness,
               normalise: Callable[[Tensor], Tensor], world: int) -> Tensor:
    """Gradients of this worker's share of a batch, by gradient accumulation with equally many passes on every worker.

    Returns:
        The losses (B,) of the share.
    """
    images, micro = len(batch.mean), engine.settings.micro_batch
    largest = -(-len(batch) // world)  # images of the largest share
    passes = -(-largest // micro) if micro else 1
    losses = []
    for k in range(passes):
        rows = slice(k * images // passes, (k + 1) * images // passes)
        drawn = randomness.rows(rows)
        latents = batch.mean[rows]
        if batch.logvar is not None:
            latents = latents + (0.5 * batch.logvar[rows]).exp() * drawn.posterior
        latents = normalise(latents)
        conditions = {name: value[rows] for name, value in batch.conditions.items()}
        pass_losses = objective.losses(engine.model, latents, conditions, drawn)
        engine.backward(pass_losses.sum() * (world / len(batch)), last=k == passes - 1)
        losses.append(pass_losses.detach())
    return torch.cat(losses)


@contextlib.contextmanager
def manual_gc() -> Iterator[Callable[[bool], None]]:
    """Disable automatic garbage collection, which would stall workers at different steps.

    The yielded function is called after every step, with whether to collect now.
    """
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
    """Trace `steps` steps, after ten others, into profile/trace.json.

    The yielded function is called after every step.
    """
    if not steps:
        yield lambda: None
        return
    import tempfile
    from pathlib import Path

    from torch.profiler import ProfilerActivity, profile, schedule

    def upload_trace(finished: profile) -> None:
        with tempfile.TemporaryDirectory() as staging_dir:
            finished.export_chrome_trace(str(Path(staging_dir) / "trace.json"))
            (folder / "profile").upload(staging_dir)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, schedule=schedule(wait=8, warmup=2, active=steps, repeat=1),
                 on_trace_ready=upload_trace) as running:
        yield running.step
