"""Stage `train`: Ray Train runs a DeepSpeed worker per GPU over cached latents; the one module that knows Ray Train."""

from __future__ import annotations

import functools
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from cluster.session import Apart, cores, use_cores
from cluster.storage import Folder
from pipelines.generator import checkpoint, node, validate
from pipelines.generator.checkpoint import Cursor
from pipelines.generator.engine import Engine, Tensors
from pipelines.generator.export import export
from pipelines.generator.loop import Job, learn
from pipelines.generator.reader import kind_of
from pipelines.progress import JOURNAL, follow, read_journal, say
from pipelines.settings import Trainer
from pipelines.stage import Metrics, Stage

WORST = 1e30  # of a checkpoint that is not measured: Ray would take it for the best, and delete those that are
WRITING = threading.Semaphore()  # held by rank 0 while a checkpoint is written
VALIDATION_SECONDS = 3600.0  # a validation that cannot start or end holds up the next, and keeps its checkpoint
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints
JOURNALS = (JOURNAL, validate.FILE)


def train(stage: Stage) -> Metrics:
    """Returns images seen, loss, images/s, the share of time spent waiting for data, and the EMA's distance.

    Raises:
        ValueError: more workers are asked for than the cluster has room for, or the settings do not fit the latents.
        FloatingPointError: the loss was no finite number in too many batches.
    """
    from pipelines.generator.autoencoder import load_autoencoder

    config = load_autoencoder(stage.input("autoencoder")).config
    job = Job(stage.settings, stage.fingerprint, stage.folder, stage.input("latents"), list(config.latents_mean),
              list(config.latents_std))
    with torch.device("meta"):
        job.denoiser(kind_of(job.latents))  # a network that does not fit the latents is told before workers start
    trainer, begun = stage.settings.trainer, checkpoint.newest_whole(stage.folder / "checkpoints")
    since = 0
    if begun:
        cursor = checkpoint.cursor_of(begun)
        since = cursor.images
        say(f"train: goes on from {since:,} of {trainer.images:,} images, after {cursor.steps:,} steps ({begun.uri})")
    with follow(stage.folder, "train", trainer.images, JOURNALS, trainer.boards, since):
        last = _fit(job, stage)
    chosen = best_checkpoint(stage.folder, trainer) or last
    images = checkpoint.images_of(_name(chosen))
    ema, held_out = best_average(trainer, validate.of(stage.folder, images))
    parameters = export(job, chosen, ema, stage.input("autoencoder"), stage.input("encoder"))
    return summarise(read_journal(stage.folder)) | held_out | {
        "parameters": parameters, "exported": f"{ema} at {images:,} images"}


def _name(folder: Folder) -> str:
    return Path(folder.path).name


def _fit(job: Job, stage: Stage) -> Folder:
    """Run the workers to the end.  Returns the last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer, resources = stage.settings.trainer, stage.resources
    wanted, there = trainer.workers, resources.gpus or resources.cpus
    if (trainer.min_workers or wanted) > there:
        raise ValueError(f"trainer.workers={wanted}: the cluster has {there} {'GPUs' if resources.gpus else 'CPUs'}")
    checkpoints = stage.folder / "checkpoints"
    result = TorchTrainer(
        work,
        train_loop_config={"job": job, "earlier": earlier_checkpoint(checkpoints)},
        scaling_config=ScalingConfig(
            num_workers=(trainer.min_workers, wanted) if trainer.min_workers else wanted,
            use_gpu=resources.gpus > 0,
            resources_per_worker=None if resources.gpus else {"CPU": resources.cpus_each(wanted)},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=stage.folder.path,
            storage_filesystem=None if stage.folder.is_local else stage.folder.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=trainer.keep_checkpoints,
                                               checkpoint_score_attribute=trainer.best, checkpoint_score_order="min"),
            failure_config=FailureConfig(max_failures=trainer.max_failures),
        ),
        validation_config=_validation(job, stage),
    ).fit()
    if result.return_value is not None:
        raise FloatingPointError(result.return_value)
    last = checkpoint.newest_whole(checkpoints)
    assert last is not None, "training ends with a checkpoint"
    if stage.settings.validate.images and not validate.of(stage.folder, checkpoint.images_of(_name(last))):
        say("train: the last checkpoint could not be validated")
    return last


def _validation(job: Job, stage: Stage) -> Any:
    """How Ray Train has checkpoints measured in a task beside the workers: on a GPU where one is free, else on CPUs."""
    from ray.train import ValidationConfig

    if not stage.settings.validate.images:
        return None
    there = stage.resources.gpus
    spare = there > stage.settings.trainer.workers
    hidden = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}} if there and not spare else {}
    measure = Apart("pipelines.generator.train:validate_beside", {"num_gpus": int(spare), "num_cpus": 0, **hidden}, {
        "job": job, "autoencoder": stage.input("autoencoder"), "encoder": stage.input("encoder"),
        "all_cores": bool(hidden)})
    return ValidationConfig(measure, ray_remote_kwargs={"num_cpus": 0})


def validate_beside(ray_checkpoint: Any, frechet: bool, job: Job, all_cores: bool, **inputs: Folder) \
        -> dict[str, float]:
    """Measure a checkpoint that Ray Train was given."""
    if all_cores:
        use_cores()
    return validate.validate(job, folder=job.folder / "checkpoints" / Path(ray_checkpoint.path).name, frechet=frechet,
                             **inputs)


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


def work(config: dict[str, Any]) -> str | None:
    """One worker of Ray Train.  Returns why it stopped before the end, or None."""
    import ray.train

    job: Job = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if job.settings.trainer.offload:
        use_cores(max(cores() // context.get_local_world_size(), 1))  # AdamW works on the host
    if context.get_local_rank() == 0:
        node.sweep(job.folder)
    state, cursor = _last_checkpoint(job, config["earlier"])
    return learn(job, rank, world, state, cursor, functools.partial(_save, job, rank), _leaving)


def _leaving() -> bool:
    import ray.train

    return ray.train.get_preemption_info() is not None


def _last_checkpoint(job: Job, earlier: Folder | None) -> tuple[dict[str, Tensors], Cursor]:
    import ray.train

    if last := ray.train.get_checkpoint():
        with last.as_directory() as folder:
            return checkpoint.load(Path(folder), job.fingerprint)
    if earlier:
        with tempfile.TemporaryDirectory() as folder:
            earlier.download(folder)
            return checkpoint.load(Path(folder), job.fingerprint)
    return {}, Cursor(0, 0, job.fingerprint)


def _save(job: Job, rank: int, engine: Engine, cursor: Cursor, since: int) -> None:
    """Every worker calls this: gathering and reporting are collectives.  Writing goes on beside the training.

    `since` are the images at the checkpoint before.
    """
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode
    from ray.train.v2.api.validation_config import ValidationTaskConfig

    trainer, settings = job.settings.trainer, job.settings.validate
    if rank == 0:
        WRITING.acquire()  # else the states of checkpoints that are slow to write would fill the memory
    state = engine.state()

    def due(every: int | None) -> bool:
        return cursor.images == trainer.images or every is None or since // every != cursor.images // every

    aside = node.aside(job.folder) if rank == 0 else None  # Ray deletes it in the end
    task = ValidationTaskConfig(fn_kwargs={"frechet": settings.frechet_images > 0 and due(settings.frechet_every)},
                                timeout_s=VALIDATION_SECONDS)
    milestone = trainer.milestone_every is not None and due(trainer.milestone_every)
    unmeasured = {trainer.best: WORST} if trainer.best else {}
    ray.train.report({"images": cursor.images, **unmeasured}, Checkpoint(aside) if aside else None,
                     checkpoint_dir_name=checkpoint.name(cursor.images),
                     checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                     checkpoint_upload_fn=functools.partial(_write, job.folder, state, cursor, milestone),
                     validation=task if aside and settings.images and due(settings.every) else False)


def _write(folder: Folder, state: dict[str, Tensors], cursor: Cursor, milestone: bool, aside: Any, name: str) -> Any:
    """Keep a checkpoint among the last ones, and where it is a milestone for good, too; in a thread of rank 0."""
    from ray.train import Checkpoint

    try:
        checkpoint.save(Path(aside.path), state, cursor)
        if milestone:
            (folder / "milestones" / name).upload(aside.path)
        kept = folder / "checkpoints" / name
        kept.upload(aside.path)
        return Checkpoint(kept.path, kept.filesystem)
    finally:
        WRITING.release()


def best_checkpoint(folder: Folder, trainer: Trainer) -> Folder | None:
    """The checkpoint with the least of what `trainer.best` names among those kept; None where it names nothing."""
    kept = {checkpoint.images_of(name) for name in (folder / "checkpoints").names()
            if name.startswith(checkpoint.PREFIX)}
    known = [(entry[trainer.best], entry["images"]) for entry in read_journal(folder, validate.FILE)
             if trainer.best in entry and entry["images"] in kept]
    return folder / "checkpoints" / checkpoint.name(min(known)[1]) if known else None


def best_average(trainer: Trainer, measured: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Which average of the weights to export, and what is known of it.

    It is the one with the least validation loss; the first where none was measured, or where the Fréchet distance
    chose, which is the first's.
    """
    losses = {average: measured.get(name) for average, name in validate.loss_names(trainer).items()}
    first = next(iter(losses))
    best = first if trainer.best == "val_frechet" else min(losses, key=lambda average: losses[average] or 0.0)
    known = {"val_loss": losses[best], "val_frechet": measured.get("val_frechet") if best == first else None}
    return best, {name: value for name, value in known.items() if value is not None}


def summarise(entries: list[dict[str, Any]]) -> Metrics:
    """Figures of a whole training from its journal: the median rate, and the mean of the last tenth of the losses."""
    rates = sorted(entry["images_per_second"] for entry in entries)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    tail = losses[-max(len(losses) // 10, 1) :]
    waits = [entry["data_wait_fraction"] for entry in entries]
    last = entries[-1]
    return {
        "images": last["images"],
        "loss": round(sum(tail) / max(len(tail), 1), 6),
        "images_per_second": rates[len(rates) // 2],
        "data_wait_fraction": round(sum(waits) / len(waits), 5),
        "ema_distance": last.get("ema_distance"),
        "skipped_batches": last["skipped"],
        **({"mfu": last["mfu"]} if "mfu" in last else {}),
    }
