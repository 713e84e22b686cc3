"""Where training runs: the accelerator, the room it waits for, and the CPUs and actors of each part."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from cluster.errors import UserError
from cluster.session import Resources, count_resources, gpu_bundle
from pipelines.generator.latents.encode import EncodingSpec
from pipelines.generator.latents.feed import StreamPlan
from pipelines.generator.latents.spec import LatentSpec
from pipelines.generator.settings import LatentsSettings
from pipelines.generator.training.settings import TrainerSettings, ValidateSettings
from pipelines.graph.stage import Stage
from pipelines.monitor.progress import say

MIN_CPUS = 0.1  # smallest CPU request of a worker
POLL_SECONDS, SAY_SECONDS = 2.0, 60.0


def training_resources(trainer: TrainerSettings, resources: Resources) -> Resources:
    """What training may use of the cluster, once that has room for the least number of workers.

    On a cluster that can grow, nodes for all workers are requested from Ray's autoscaler, and waited for.

    Raises:
        UserError: no room after `trainer.wait_seconds`, or at once on a cluster of this machine alone.
    """
    there = resources.gpus > 0 or trainer.accelerator_type is not None
    on_gpus = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and there)
    if trainer.accelerator == "auto":
        say("train: on GPUs" if on_gpus else
            "train: on CPUs, as the cluster has no GPU; trainer.accelerator=gpu waits for GPUs")
    least, wanted = trainer.min_workers or trainer.workers, "GPUs" if on_gpus else "CPUs"
    if on_gpus and trainer.accelerator_type:
        wanted = f"GPUs of type {trainer.accelerator_type}"

    def room() -> tuple[Resources, int]:
        now = count_resources(trainer.accelerator_type if on_gpus else None)
        return now, now.gpus if on_gpus else now.cpus

    found, available = room()
    if available < least and not resources.fixed:
        found, available = _wait(trainer, on_gpus, room, least, wanted)
    if available < least:
        waited = "" if resources.fixed else f" after {trainer.wait_seconds:g} s (trainer.wait_seconds)"
        raise UserError(f"trainer.workers={trainer.workers}: the cluster has {available} {wanted}{waited}, training "
                        f"needs {least}")
    return found if on_gpus else replace(found, gpus=0, hides_gpus=found.gpus > 0)


def _wait(trainer: TrainerSettings, on_gpus: bool, room: Any, least: int, wanted: str) -> tuple[Resources, int]:
    """The resources as soon as there is room, or after `trainer.wait_seconds`."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[gpu_bundle(trainer.accelerator_type) if on_gpus else {"CPU": 1.0}] * trainer.workers)
    try:
        start, said = time.monotonic(), -math.inf
        found, available = room()
        while available < least and time.monotonic() - start < trainer.wait_seconds:
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                say(f"train: waits for {least} {wanted}, {available} are there")
            time.sleep(POLL_SECONDS)
            found, available = room()
        return found, available
    finally:
        request_resources(bundles=[])


def validates_on_gpu(stage: Stage) -> bool:
    """Whether validations have a GPU beside those of the workers and of the actors that encode streamed images."""
    trainer, validation = stage.section(TrainerSettings), stage.section(ValidateSettings)
    encoding = 0 if trainer.reader == "cached" else trainer.encoder_actors or 1
    return validation.images > 0 and (validation.accelerator == "gpu" or (
        validation.accelerator == "auto" and stage.resources.gpus > trainer.workers + encoding))


def has_spare_gpu(stage: Stage) -> bool:
    """Whether the cluster has more GPUs now than the least number of workers."""
    trainer = stage.section(TrainerSettings)
    return count_resources(stage.resources.accelerator_type).gpus > (trainer.min_workers or trainer.workers)


def trainer_cpus(stage: Stage) -> float:
    """CPUs per worker on a cluster without GPUs; with reader=stream some are left to read and encode images."""
    trainer, resources = stage.section(TrainerSettings), stage.resources
    if trainer.reader == "cached":
        return resources.cpus_each(trainer.workers)
    free = (resources.cpus - encoder_actors(stage)) / trainer.workers
    return min(math.floor(free), resources.node_cpus) if free >= 1 else math.floor(free * 100) / 100


def encoder_actors(stage: Stage) -> int:
    """Number of actors that encode streamed images: on GPUs not used otherwise if there are any, else on CPUs."""
    return stage.section(TrainerSettings).encoder_actors or free_gpus(stage) or max(stage.resources.cpus // 4, 1)


def free_gpus(stage: Stage) -> int:
    """GPUs that neither train nor validate."""
    return max(stage.resources.gpus - stage.section(TrainerSettings).workers - validates_on_gpu(stage), 0)


def stream_plan(stage: Stage, spec: LatentSpec) -> StreamPlan | None:
    """How images are streamed to the workers; None with reader=cached.

    Raises UserError if the cluster has no room for both encoding actors and workers, or if a batch is larger than a
    shuffle window.
    """
    trainer, resources = stage.section(TrainerSettings), stage.resources
    if trainer.reader == "cached":
        return None
    smallest = sorted(rows for rows in spec.rows if rows)[: trainer.shuffle_shards]
    if len(smallest) == trainer.shuffle_shards and sum(smallest) < trainer.batch:
        raise UserError(f"trainer.shuffle_shards={trainer.shuffle_shards} shards hold fewer images than "
                        f"trainer.batch={trainer.batch}; raise trainer.shuffle_shards or lower trainer.batch")
    actors = encoder_actors(stage)
    on_gpu = actors <= free_gpus(stage)
    worker_cpus = 1.0 if resources.gpus else trainer_cpus(stage)
    if worker_cpus < MIN_CPUS:
        raise UserError(f"trainer.encoder_actors={actors} leaves too few of the {resources.cpus} CPUs for "
                        f"trainer.workers={trainer.workers}; lower one of the two")
    reserved = {"cpu": worker_cpus * trainer.workers} | ({"gpu": float(trainer.workers)} if resources.gpus else {})
    ray_options = resources.accelerator if on_gpu else {"num_cpus": 0.5, **resources.without_gpus}
    encoding = EncodingSpec(stage.input("autoencoder"), stage.input("encoder"), stage.section(LatentsSettings),
                            spec.logvar)
    ray_options["fn_constructor_args"] = (encoding, None if on_gpu else 1)
    return StreamPlan(stage.input("ingest") / "images", encoding, spec.rows, stage.seed, trainer.shuffle_shards,
                      trainer.augment, actors, ray_options, reserved)
