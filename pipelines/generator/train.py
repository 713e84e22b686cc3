"""Stage `train`: Ray Train runs one DeepSpeed worker per GPU over cached latents; the one module that knows Ray Train.

The loop is a function of (settings, seed, images seen): a run that is killed and started again, on any number of
workers, goes on from its last checkpoint to the result of an unbroken one.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.session import device
from cluster.storage import Folder
from pipelines.generator import checkpoint
from pipelines.generator.denoiser import Denoiser, build
from pipelines.generator.engine import Engine
from pipelines.generator.fit import warmup_cosine
from pipelines.generator.objective import Objective, process
from pipelines.generator.reader import Batch, Reader
from pipelines.progress import Journal, follow, read_journal, say
from pipelines.settings import Settings
from pipelines.stage import Metrics, Stage

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints


@dataclass(frozen=True)
class Job:
    """What a training worker needs to know."""

    settings: Settings
    fingerprint: str
    folder: Folder  # of the train stage
    latents: Folder
    latents_mean: list[float]  # per channel
    latents_std: list[float]
    earlier: Folder | None  # checkpoint to go on from where Ray knows of none


def train(stage: Stage) -> Metrics:
    """Returns images seen, loss, images/s, the share of time spent waiting for data, and the EMA's distance."""
    from pipelines.generator.autoencoder import load_autoencoder

    config = load_autoencoder(stage.input("autoencoder")).config
    job = Job(stage.settings, stage.fingerprint, stage.folder, stage.input("latents"), list(config.latents_mean),
              list(config.latents_std), earlier_checkpoint(stage.folder / "checkpoints"))
    with follow(stage.folder, "train", stage.settings.trainer.images):
        last = _fit(job, stage)
    parameters = export(stage, last)
    return summarise(read_journal(stage.folder)) | {"parameters": parameters}


def _fit(job: Job, stage: Stage) -> Folder:
    """Run the workers to the end.  Returns the last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer, resources = stage.settings.trainer, stage.resources
    wanted, there = trainer.workers, resources.gpus or resources.cpus
    if wanted > there:
        raise ValueError(f"trainer.workers={wanted}: the cluster has {there} {'GPUs' if resources.gpus else 'CPUs'}")
    checkpoints = stage.folder / "checkpoints"
    kept = [name for name in checkpoints.names() if name.startswith(checkpoint.PREFIX)]
    if kept:
        say(f"train: goes on from the last whole checkpoint of {', '.join(kept)}")
    result = TorchTrainer(
        work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=wanted,
            use_gpu=resources.gpus > 0,
            resources_per_worker=None if resources.gpus else {"CPU": resources.cpus_each(wanted)},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=stage.folder.path,
            storage_filesystem=None if stage.folder.is_local else stage.folder.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=trainer.keep_checkpoints),
            failure_config=FailureConfig(max_failures=trainer.max_failures),
        ),
    ).fit()
    assert result.checkpoint is not None, "training ends with a checkpoint"
    return checkpoints / Path(result.checkpoint.path).name


def earlier_checkpoint(checkpoints: Folder) -> Folder | None:
    """The newest whole checkpoint where Ray's own list of them is missing or was cut off while it was written.

    Ray writes that list in place, and refuses to start on half of one; it is then removed.
    """
    try:
        if checkpoints.read_json(SNAPSHOT) is not None:
            return None
    except RuntimeError:
        checkpoints.remove(SNAPSHOT)
    return checkpoint.newest_whole(checkpoints)


def work(config: dict[str, Any]) -> None:
    """One worker: the whole training loop."""
    import ray.train

    job: Job = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    trainer, seed = job.settings.trainer, job.settings.seed
    reader = Reader(job.latents, seed)
    torch.manual_seed(seed)
    denoiser = build(job.settings.denoiser, reader.latent, reader.embedding.shape[1], reader.labels)
    state, cursor = _last_checkpoint(job)
    if state:
        denoiser.load_state_dict(state["model"])
    engine = Engine(denoiser, trainer, world)
    if state:
        engine.load(state, cursor.steps)
    objective = Objective(job.settings.objective, device())
    mean, std = (torch.tensor(v, device=device()).view(1, -1, 1, 1) for v in (job.latents_mean, job.latents_std))
    log = Log(Journal(job.folder, cursor.images) if rank == 0 else None, reader, world)
    seen, steps = cursor.images, cursor.steps
    for batch in reader.batches(trainer.images, trainer.batch, seen, rank, world, device()):
        size = batch.stop - batch.start
        draw = objective.draw((size, *reader.latent), seed, batch.start, rank, world)
        latents = (batch.mean + (0.5 * batch.logvar).exp() * draw.posterior - mean) / std
        loss = objective.losses(engine.module, latents, batch.embedding, batch.labels, draw).mean()
        rate = warmup_cosine(batch.start / trainer.images, min(trainer.warmup_images / trainer.images, 1),
                             trainer.final_lr_fraction)
        engine.step(loss, trainer.lr * rate, size, batch.stop)
        steps += 1
        seen = batch.stop
        log.add(loss)
        save = crossed(batch, trainer.checkpoint_every) or seen == trainer.images
        if save or crossed(batch, trainer.log_every):
            log.write(seen, lr=trainer.lr * rate, ema_distance=engine.ema_distance(), grad_norm=engine.grad_norm())
        if save:  # only what was just found finite; a resumed run's intervals begin here
            _save(engine, checkpoint.Cursor(seen, steps, job.fingerprint), rank)


def crossed(batch: Batch, every: int) -> bool:
    """Whether a multiple of `every` images lies in the batch."""
    return batch.start // every != batch.stop // every


def _last_checkpoint(job: Job) -> tuple[dict[str, dict[str, Tensor]], checkpoint.Cursor]:
    import ray.train

    if last := ray.train.get_checkpoint():
        with last.as_directory() as folder:
            return checkpoint.load(Path(folder), job.fingerprint)
    if job.earlier:
        with tempfile.TemporaryDirectory() as folder:
            job.earlier.download(folder)
            return checkpoint.load(Path(folder), job.fingerprint)
    return {}, checkpoint.Cursor(0, 0, job.fingerprint)


def _save(engine: Engine, cursor: checkpoint.Cursor, rank: int) -> None:
    """Every worker calls this: gathering and reporting are collectives.  The upload goes on beside the training."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode

    state = engine.state()
    report = None
    if rank == 0:
        folder = Path(tempfile.mkdtemp(prefix="rayograph-checkpoint-"))  # Ray deletes it after the upload
        checkpoint.save(folder, state, cursor)
        report = Checkpoint.from_directory(folder)
    ray.train.report({"images": cursor.images}, report, checkpoint_dir_name=checkpoint.name(cursor.images),
                     checkpoint_upload_mode=CheckpointUploadMode.ASYNC)


class Log:
    """Sums losses on the device and writes one line per interval, so that no step waits for the device."""

    def __init__(self, journal: Journal | None, reader: Reader, world: int) -> None:
        self.journal, self.reader, self.world = journal, reader, world
        self._losses: list[Tensor] = []
        self._start, self._waited = time.perf_counter(), 0.0

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def write(self, seen: int, **values: float) -> None:
        """A collective: the loss is the mean over workers.  Raises FloatingPointError when it is not finite."""
        loss = torch.stack(self._losses).mean()
        if self.world > 1:
            torch.distributed.all_reduce(loss)
        value = loss.item() / self.world
        now = time.perf_counter()
        wait = (self.reader.waited - self._waited) / (now - self._start)
        self._losses, self._start, self._waited = [], now, self.reader.waited
        if value != value or value in (float("inf"), -float("inf")):
            raise FloatingPointError(f"the loss is {value} at {seen} images; lower trainer.lr")
        if self.journal is not None:
            self.journal.log(seen, loss=round(value, 6), data_wait_fraction=round(wait, 5), **values)


def summarise(entries: list[dict[str, Any]]) -> Metrics:
    """Figures of a whole training from its journal: the median rate, and the mean of the last tenth of the losses."""
    rates = sorted(entry["images_per_second"] for entry in entries)
    tail = entries[-max(len(entries) // 10, 1) :]
    waits = [entry["data_wait_fraction"] for entry in entries]
    return {
        "images": entries[-1]["images"],
        "loss": round(sum(entry["loss"] for entry in tail) / len(tail), 6),
        "images_per_second": rates[len(rates) // 2],
        "data_wait_fraction": round(sum(waits) / len(waits), 5),
        "ema_distance": round(entries[-1]["ema_distance"], 6),
    }


def export(stage: Stage, last: Folder) -> int:
    """Write train/generator, a diffusers folder with the EMA weights, and verify it.  Returns the denoiser's size."""
    from pipelines.generator.autoencoder import load_autoencoder
    from pipelines.generator.encoder import load_encoder
    from pipelines.generator.export import save_pipeline, verify

    reader = Reader(stage.input("latents"), stage.settings.seed)
    denoiser = build(stage.settings.denoiser, reader.latent, reader.embedding.shape[1], reader.labels)
    aside = Path(tempfile.mkdtemp(prefix="rayograph-export-"))
    try:
        last.download(aside / "checkpoint")
        state, _ = checkpoint.load(aside / "checkpoint", stage.fingerprint)
        load_whole(denoiser, state["ema"])
        save_pipeline(
            aside / "generator",
            vae=load_autoencoder(stage.input("autoencoder")),
            unet=denoiser.unet,
            scheduler=process(stage.settings.objective, "cpu").scheduler(),
            conditioner=denoiser.conditioner,
            encoder=load_encoder(stage.input("encoder")),
            num_inference_steps=stage.settings.sample.steps,
            guidance_scale=stage.settings.sample.guidance,
        )
        verify(aside / "generator", denoiser.unet, denoiser.conditioner)
        (stage.folder / "generator").upload(aside / "generator")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(p.numel() for p in denoiser.parameters())


def load_whole(denoiser: Denoiser, tensors: dict[str, Tensor]) -> None:
    """Load weights after checking that none is missing, of another size or not finite (RuntimeError)."""
    expected = {name: value.shape for name, value in denoiser.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        raise RuntimeError(f"the checkpoint differs from the network in {sorted(expected.items() ^ found.items())[:3]}")
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise RuntimeError(f"the checkpoint is not finite in {broken[:3]}")
    denoiser.load_state_dict(tensors)
