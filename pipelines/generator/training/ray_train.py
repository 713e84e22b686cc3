"""Runs the `train` stage under Ray Train, with one DeepSpeed worker per GPU."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster import scratch
from cluster.reservation import reserved
from cluster.session import cores, gpu_bundle, use_cores
from cluster.storage import Folder
from cluster.tasks import IsolatedTask
from pipelines.generator.latents.dataset import CachedReader, LatentReader
from pipelines.generator.latents.feed import Feed
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.generator.latents.stream import StreamReader
from pipelines.generator.training import checkpoint, validate
from pipelines.generator.training.loop import TrainingSpec, run_training_loop
from pipelines.generator.training.placement import has_spare_gpu, trainer_cpus, validates_on_gpu
from pipelines.generator.training.saver import CheckpointSaver
from pipelines.graph.stage import Stage
from pipelines.monitor.progress import say

COLLECTIVE_SECONDS = 600  # a worker that hangs costs the others this long
HANG_DETECTOR = {"ENABLE_NCCL_HANG_DETECTOR": "1", "NCCL_RAS_ACTION": "fail", "NCCL_RAS_CONFIRM_DURATION_S": "300"}
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints


def run_trainer(spec: TrainingSpec, stage: Stage) -> Folder:
    """Run the workers until training ends.  Returns the last checkpoint."""
    if stage.resources.gpus:
        for name, value in HANG_DETECTOR.items():
            os.environ.setdefault(f"RAY_TRAIN_{name}", value)
    checkpoints = stage.folder / "checkpoints"
    with ExitStack() as stack:
        if stage.settings.trainer.min_workers and validates_on_gpu(stage):
            stack.enter_context(reserved(f"{stage.folder.uri}/validation",
                                         gpu_bundle(stage.resources.accelerator_type), lambda: has_spare_gpu(stage)))
        stopped = _fit(spec, stage, checkpoints)
    if stopped is not None:
        raise FloatingPointError(stopped)
    last = checkpoint.latest_complete(checkpoints)
    assert last is not None, "training ends with a checkpoint"
    if stage.settings.validate.images and not validate.validation_at(stage.folder, checkpoint.images_seen(last)):
        say("train: the last checkpoint could not be validated")
    return last


def _fit(spec: TrainingSpec, stage: Stage, checkpoints: Folder) -> str | None:
    """Run the workers until they end.  Returns why they stopped early, or None.

    Failures count against `trainer.max_failures` only until the next checkpoint: a run of weeks on spot nodes may fail
    more often than that, while one that no longer progresses ends.
    """
    from ray.train import TrainingFailedError

    start = checkpoint.latest_complete(checkpoints)
    while True:
        try:
            return _ray_trainer(spec, stage, earlier_checkpoint(checkpoints)).fit().return_value
        except TrainingFailedError:
            reached = checkpoint.latest_complete(checkpoints)
            if reached is None or (start is not None and reached.path == start.path):
                raise
            start = reached
            say(f"train: failed; resuming at {checkpoint.images_seen(reached):,} images")


def _ray_trainer(spec: TrainingSpec, stage: Stage, earlier: Folder | None) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer, resources = stage.settings.trainer, stage.resources
    return TorchTrainer(
        train_worker,
        train_loop_config={"spec": pickle.dumps(spec), "earlier": earlier},  # pickled: the controller imports no torch
        torch_config=TorchConfig(timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=(trainer.min_workers, trainer.workers) if trainer.min_workers else trainer.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=None if resources.gpus else {"CPU": trainer_cpus(stage)},
            accelerator_type=trainer.accelerator_type if resources.gpus else None,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=stage.folder.path,
            storage_filesystem=None if stage.folder.is_local else stage.folder.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=trainer.keep_checkpoints,
                                               checkpoint_score_attribute=trainer.select_by,
                                               checkpoint_score_order="min"),
            failure_config=FailureConfig(max_failures=trainer.max_failures),
            worker_runtime_env=None if resources.gpus else resources.without_gpus.get("runtime_env"),
        ),
        validation_config=_validation_config(spec, stage),
    )


def _validation_config(spec: TrainingSpec, stage: Stage) -> Any:
    """Ray Train's configuration of validation: a task alongside the workers, on a GPU or on CPUs."""
    from ray.train import ValidationConfig

    if not stage.settings.validate.images:
        return None
    resources, on_gpu = stage.resources, validates_on_gpu(stage)
    task = IsolatedTask(
        "pipelines.generator.training.ray_train:validate_checkpoint",
        {"num_cpus": 0, **(resources.gpu if on_gpu else resources.without_gpus)},
        pickle.dumps({"spec": spec, "autoencoder": stage.input("autoencoder"), "encoder": stage.input("encoder"),
                      "all_cores": resources.gpus > 0 and not on_gpu}))
    return ValidationConfig(task, ray_remote_kwargs={"num_cpus": 0})


def validate_checkpoint(ray_checkpoint: Any, frechet: bool, spec: TrainingSpec, all_cores: bool, **inputs: Folder) \
        -> dict[str, float]:
    """Validate a checkpoint reported to Ray Train."""
    if all_cores:
        use_cores()
    return validate.validate(spec, folder=spec.folder / "checkpoints" / Path(ray_checkpoint.path).name,
                             frechet=frechet, **inputs)


def earlier_checkpoint(checkpoints: Folder) -> Folder | None:
    """The latest complete checkpoint if Ray's own list of checkpoints is missing or was truncated; else None.

    Ray writes that list in place and refuses to start from a truncated one, which is removed here.
    """
    try:
        if checkpoints.read_json(SNAPSHOT) is not None:
            return None
    except RuntimeError:
        checkpoints.remove(SNAPSHOT)
    return checkpoint.latest_complete(checkpoints)


def remove_unregistered(checkpoints: Folder, resumed: Folder) -> None:
    """Remove checkpoints before `resumed` that Ray Train does not know: attempts that died left them, whole or not."""
    known = json.dumps(checkpoints.read_json(SNAPSHOT))
    if checkpoint.PREFIX not in known:
        return
    for folder in checkpoint.list_checkpoints(checkpoints):
        name = Path(folder.path).name
        if name not in known and checkpoint.images_seen(folder) < checkpoint.images_seen(resumed):
            folder.filesystem.delete_dir(folder.path)


def train_worker(config: dict[str, Any]) -> str | None:
    """A worker of Ray Train.  Returns why it stopped early, or None."""
    import ray.train

    spec: TrainingSpec = pickle.loads(config["spec"])  # noqa: S301
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if spec.settings.trainer.offload:
        use_cores(max(cores() // context.get_local_world_size(), 1))  # AdamW runs on the CPU
    latent_spec, cache = read_latent_spec(spec.latents), cache_of(spec)
    if context.get_local_rank() == 0:
        scratch.sweep(spec.folder, keep=cache)
    resumed = last_checkpoint(spec, config["earlier"])
    if resumed and rank == 0:
        remove_unregistered(spec.folder / "checkpoints", resumed)
    conditions = spec.settings.condition.used
    if spec.stream is None:
        reader: LatentReader = CachedReader(spec.latents, latent_spec, spec.settings.seed, conditions, cache)
    else:
        start = checkpoint.read_cursor(resumed).images if resumed else 0
        reader = StreamReader(spec.stream, _feed(spec, start, world), latent_spec, conditions)
    why = run_training_loop(spec, latent_spec, reader, rank, world, resumed, CheckpointSaver(spec, rank), is_preempted)
    if context.get_local_rank() == 0:
        scratch.remove(cache)
    return why


def _feed(spec: TrainingSpec, cursor: int, world: int) -> Any:
    """The actor that streams to all workers of this attempt; it is started by rank 0 and ends with rank 0's process."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    feed = None
    if get_context().get_world_rank() == 0:
        feed = ray.remote(num_cpus=0)(Feed).remote(spec.stream, cursor, spec.settings.trainer.images, world)
        ray.get(feed.start.remote())
    return broadcast_from_rank_zero(feed)


def cache_of(spec: TrainingSpec) -> Path:
    """The folder in which a node caches latents, keyed by network weights, images and conditions."""
    key = (spec.latents.read_json("key.json") or {}).get("key", "")
    return scratch.cache_dir(spec.folder, "-".join([key, *spec.settings.condition.used]))


def is_preempted() -> bool:
    """Whether Ray has announced that a node of this training will be preempted."""
    import ray.train

    return ray.train.get_preemption_info() is not None


def last_checkpoint(spec: TrainingSpec, earlier: Folder | None) -> Folder | None:
    """The checkpoint to resume from: Ray Train's last one, or else `earlier`."""
    import ray.train

    last = ray.train.get_checkpoint()
    return spec.folder / "checkpoints" / Path(last.path).name if last else earlier
