"""Stage `train`: Ray Train runs a DeepSpeed worker per GPU over cached latents; the one module that knows Ray Train."""

from __future__ import annotations

import functools
import math
import tempfile
import threading
from pathlib import Path
from typing import Any

from cluster import scratch
from cluster.errors import UserError
from cluster.session import Resources, cores, use_cores
from cluster.storage import Folder
from cluster.tasks import IsolatedTask
from pipelines.generator.latents.dataset import CachedReader, Reader
from pipelines.generator.latents.encode import Encode
from pipelines.generator.latents.feed import Feed, StreamPlan
from pipelines.generator.latents.spec import LatentSpec, latent_spec
from pipelines.generator.latents.stream import StreamReader
from pipelines.generator.settings import LatentsSettings, TrainerSettings
from pipelines.generator.training import checkpoint, validate
from pipelines.generator.training.checkpoint import Cursor
from pipelines.generator.training.deepspeed import Engine
from pipelines.generator.training.loop import Job, learn
from pipelines.generator.training.sharded_state import Tensors
from pipelines.graph.stage import Stage
from pipelines.monitor.progress import say

WORST = 1e30  # of a checkpoint that is not measured: Ray would take it for the best, and delete those that are
WRITING = threading.Semaphore()  # held by rank 0 while a checkpoint is written
VALIDATION_SECONDS = 3600.0  # a validation that cannot start or end holds up the next, and keeps its checkpoint
MIN_CPUS = 0.1  # of a worker, as Ray counts them: it takes what the others leave
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints


def _name(folder: Folder) -> str:
    return Path(folder.path).name


def _fit(job: Job, stage: Stage) -> Folder:
    """Run the workers to the end.  Returns the last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer, resources = stage.settings.trainer, stage.resources
    wanted, there = trainer.workers, resources.gpus or resources.cpus
    if (trainer.min_workers or wanted) > there:
        raise UserError(f"trainer.workers={wanted}: the cluster has {there} {'GPUs' if resources.gpus else 'CPUs'}")
    checkpoints = stage.folder / "checkpoints"
    result = TorchTrainer(
        work,
        train_loop_config={"job": job, "earlier": earlier_checkpoint(checkpoints)},
        scaling_config=ScalingConfig(
            num_workers=(trainer.min_workers, wanted) if trainer.min_workers else wanted,
            use_gpu=resources.gpus > 0,
            resources_per_worker=None if resources.gpus else {"CPU": trainer_cpus(trainer, resources)},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=stage.folder.path,
            storage_filesystem=None if stage.folder.is_local else stage.folder.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=trainer.keep_checkpoints,
                                               checkpoint_score_attribute=trainer.select_by,
                                               checkpoint_score_order="min"),
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


def trainer_cpus(trainer: TrainerSettings, resources: Resources) -> float:
    """CPUs of each worker where there are no GPUs; streaming leaves some to those who read and encode."""
    if trainer.reader == "cached":
        return resources.cpus_each(trainer.workers)
    free = (resources.cpus - encoders(trainer, resources)) / trainer.workers
    return min(math.floor(free), resources.node_cpus) if free >= 1 else math.floor(free * 100) / 100


def encoders(trainer: TrainerSettings, resources: Resources) -> int:
    """Actors that encode streamed images: on GPUs that do not train where there are any, else on CPUs."""
    return trainer.encoder_actors or max(resources.gpus - trainer.workers, 0) or max(resources.cpus // 4, 1)


def stream_plan(stage: Stage, spec: LatentSpec) -> StreamPlan | None:
    """How images are streamed to the workers, where they are.

    Raises UserError where the cluster has no room for those who encode beside those who train, or where a batch is
    larger than a window.
    """
    trainer, resources = stage.section(TrainerSettings), stage.resources
    if trainer.reader == "cached":
        return None
    smallest = sorted(rows for rows in spec.rows if rows)[: trainer.shuffle_shards]
    if len(smallest) == trainer.shuffle_shards and sum(smallest) < trainer.batch:
        raise UserError(f"trainer.shuffle_shards={trainer.shuffle_shards} shards hold fewer images than "
                        f"trainer.batch={trainer.batch}; raise trainer.shuffle_shards or lower trainer.batch")
    count = encoders(trainer, resources)
    on_gpu = 0 < count <= resources.gpus - trainer.workers
    each = 1.0 if resources.gpus else trainer_cpus(trainer, resources)
    if each < MIN_CPUS:
        raise UserError(f"trainer.encoder_actors={count}: they leave too little of {resources.cpus} CPUs to "
                        f"trainer.workers={trainer.workers}")
    held = {"cpu": each * trainer.workers} | ({"gpu": float(trainer.workers)} if resources.gpus else {})
    hidden = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}} if resources.gpus and not on_gpu else {}
    needs = {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": 0.5, **hidden}
    encode = Encode(stage.input("autoencoder"), stage.input("encoder"), stage.section(LatentsSettings), spec.logvar)
    return StreamPlan(stage.input("ingest") / "images", encode, spec.rows, stage.seed, trainer.shuffle_shards,
                      trainer.augment, count, needs | {"fn_constructor_args": (encode, None if on_gpu else 1)}, held)


def _validation(job: Job, stage: Stage) -> Any:
    """How Ray Train has checkpoints measured in a task beside the workers: on a GPU where one is free, else on CPUs."""
    from ray.train import ValidationConfig

    if not stage.settings.validate.images:
        return None
    there = stage.resources.gpus
    spare = there > stage.settings.trainer.workers
    hidden = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}} if there and not spare else {}
    measure = IsolatedTask(
        "pipelines.generator.training.ray_train:validate_beside", {"num_gpus": int(spare), "num_cpus": 0, **hidden},
        {"job": job, "autoencoder": stage.input("autoencoder"), "encoder": stage.input("encoder"),
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
    spec, cache = latent_spec(job.latents), cache_of(job)
    if context.get_local_rank() == 0:
        scratch.sweep(job.folder, keep=cache)
    state, cursor = _last_checkpoint(job, config["earlier"])
    if job.stream is None:
        reader: Reader = CachedReader(job.latents, spec, job.settings.seed, job.settings.condition.used, cache)
    else:
        reader = StreamReader(job.stream, _feed(job, cursor.images, world), spec, job.settings.condition.used)
    why = learn(job, spec, reader, rank, world, state, cursor, functools.partial(_save, job, rank), _leaving)
    if context.get_local_rank() == 0:
        scratch.remove(cache)
    return why


def _feed(job: Job, cursor: int, world: int) -> Any:
    """The actor that streams to all workers of this attempt; rank 0 starts it, and with its worker it ends."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    feed = None
    if get_context().get_world_rank() == 0:
        feed = ray.remote(num_cpus=0)(Feed).remote(job.stream, cursor, job.settings.trainer.images, world)
        ray.get(feed.start.remote())
    return broadcast_from_rank_zero(feed)


def cache_of(job: Job) -> Path:
    """Where a node keeps the latents of a training: other weights, images or conditions lie elsewhere."""
    key = (job.latents.read_json("key.json") or {}).get("key", "")
    return scratch.cache_dir(job.folder, "-".join([key, *job.settings.condition.used]))


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

    aside = scratch.staging_dir(job.folder) if rank == 0 else None  # Ray deletes it in the end
    task = ValidationTaskConfig(fn_kwargs={"frechet": settings.frechet_images > 0 and due(settings.frechet_every)},
                                timeout_s=VALIDATION_SECONDS)
    milestone = trainer.milestone_every is not None and due(trainer.milestone_every)
    unmeasured = {trainer.select_by: WORST} if trainer.select_by else {}
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
