"""Stage `sample`: a pool of Ray actors samples the corpus in numbered shards.

A shard is a range of image indices. It is a function of (seed, index) only and committed atomically, so that a shard
that is retried or computed twice gives the same file: actors may die at any time.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.actors import ActorPool
from cluster.errors import UserError
from cluster.session import Resources, use_cores
from cluster.storage import Folder
from pipelines.data.labels import ABSENT, PRESENT
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import bar, say
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import READERS, pending_shards, read_columns, shard_count, write_shard
from pipelines.tables.schemas import CORPUS
from synth.conditions import Condition, PoolIndex, find_strategy, read_pool_index, unconditional
from synth.settings import SampleSettings

CPU_ACTOR_BYTES = 1 << 30  # that Ray reserves for an actor without a GPU: torch and a generator of the size of the demo


@dataclass(frozen=True)
class SamplingSpec:
    """The parameters of a sampling actor."""

    settings: SampleSettings
    seed: int
    generator: Folder  # a diffusers folder
    revision: str  # fingerprint of its training
    latents: Folder
    corpus: Folder


def sample(stage: Stage) -> Metrics:
    """Returns the number of images in the corpus, images/s of this call, and the strategy."""
    settings = stage.section(SampleSettings)
    find_strategy(settings.strategy)
    spec = SamplingSpec(settings, stage.seed, stage.input("train") / "generator",
                        stage.record_of("train")["fingerprint"], stage.input("latents"), stage.folder / "corpus")
    pending = pending_shards(spec.corpus, shard_count(settings.images, settings.shard_rows))
    with bar("sample", settings.images) as progress:
        progress.to(settings.images - sum(len(shard_range(settings, shard)) for shard in pending))
        done = 0
        start = time.perf_counter()
        for event in fan_out(spec, pending, stage.resources):
            if event is None:
                start = time.perf_counter()  # the actors are ready
                continue
            done += event
            progress.add(event)
        seconds = time.perf_counter() - start
    metrics: Metrics = {"images": read_columns(spec.corpus, ["image_id"]).num_rows, "strategy": settings.strategy,
                        "steps": settings.steps, "guidance": settings.guidance}
    assert metrics["images"] == settings.images, f"{metrics['images']} of {settings.images} images in the corpus"
    return metrics | ({"images_per_second": round(done / seconds, 2)} if done else {})


def shard_range(settings: SampleSettings, shard: int) -> range:
    """Indices of the images in a shard."""
    return range(shard * settings.shard_rows, min((shard + 1) * settings.shard_rows, settings.images))


class SamplingActor:
    """A Ray actor that keeps one generator loaded."""

    def __init__(self, spec: SamplingSpec, index: PoolIndex) -> None:
        from synth.conditions import Pool
        from synth.sampler import Sampler

        use_cores(1)  # the order of sums, and so the last bits of an image, depend on the number
        settings = spec.settings
        self.spec = spec
        self.sampler = Sampler(spec.generator, settings.steps, settings.guidance, settings.batch)
        self.pool, self.label_names = Pool(spec.latents, index), index.label_names
        given = self.sampler.pipeline.conditioner.shapes.keys()
        self.strategy_name = settings.strategy if given else "unconditional"
        self.strategy = find_strategy(settings.strategy) if given else unconditional
        self.shows_findings = bool(given & {"embedding", "patches", "labels"})  # a mask alone does not

    def ready(self) -> None:
        """Returns once the actor has started."""

    def run(self, shard: int) -> int:
        """Sample and commit one shard.  Returns its number of images."""
        spec, indices = self.spec, shard_range(self.spec.settings, shard)
        with ThreadPoolExecutor(READERS) as pool:  # reads while images are sampled
            conditions = pool.map(lambda index: self.strategy(self.pool, np.random.default_rng([spec.seed, index])),
                                  indices)
            to_sample, to_record = itertools.tee(conditions)
            images = self.sampler.sample(to_sample, spec.seed, indices)
        rows = [{
            "image_id": hashlib.sha256(image.tobytes()).hexdigest()[:32],
            "image": encode_png(image),
            "labels": self._findings(condition, PRESENT),
            "absent": self._findings(condition, ABSENT),
            "strategy": self.strategy_name,
            "source_image_ids": list(condition.sources),
            "seed": spec.seed,
            "index": index,
            "guidance": spec.settings.guidance,
            "steps": spec.settings.steps,
            "generator": spec.revision,
        } for index, image, condition in zip(indices, images, to_record, strict=True)]
        write_shard(spec.corpus, shard, pa.Table.from_pylist(rows, schema=CORPUS))
        return len(rows)

    def _findings(self, condition: Condition, state: int) -> list[str]:
        if not self.shows_findings:
            return []
        labels = zip(self.label_names, condition.values["labels"], strict=True)
        return [name for name, label in labels if label == state]


def fan_out(spec: SamplingSpec, shards: list[int], resources: Resources) -> Iterator[int | None]:
    """Run `shards` on a pool of actors.

    Yields None once when the first actor is ready, then the number of images of each shard as it is committed.

    Raises:
        UserError: the cluster has no room for the requested actors.
        RuntimeError: actors died again and again.
    """
    if not shards:
        return
    import ray

    available = resources.gpus or resources.cpus
    if (spec.settings.actors or 0) > available:
        raise UserError(f"sample.actors={spec.settings.actors}: the cluster has {available} "
                         f"{'GPUs' if resources.gpus else 'CPUs'}")
    count = min(spec.settings.actors or available, len(shards))
    needs = resources.accelerator | ({} if resources.gpus else {"memory": CPU_ACTOR_BYTES})
    actor = ray.remote(max_restarts=0, **needs)(SamplingActor)
    index = ray.remote(read_pool_index).remote(spec.latents)
    pool = ActorPool(lambda: actor.remote(spec, index), count, lambda text: say(f"sample: {text}"))
    for event in pool.run(shards):
        yield None if event is None else event[1]
