"""Checkpoints under Ray Train: each worker writes its own part in the background; validated beside the training.

However fast the cluster trains, one checkpoint is written at a time, and one is validated.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

from cluster import scratch
from cluster.storage import Folder
from pipelines.generator.training import checkpoint, validate
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.deepspeed import DeepSpeedTrainer
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.sharded_state import Tensors

WORST = 1e30  # reported for a checkpoint not yet validated: without it Ray would rank it best and delete validated ones


class CheckpointSaver:
    """Saves the checkpoints of one worker's training."""

    def __init__(self, spec: TrainingSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self._idle = threading.Event()  # no checkpoint is being written
        self._idle.set()
        self._layout: Layout | None = None
        self._validation: tuple[int, float] | None = None  # images and start of the last validation that was asked for

    def __call__(self, engine: DeepSpeedTrainer, cursor: Cursor, since: int) -> None:
        """Copy the state and report the checkpoint to Ray Train, a collective; it is written in the background.

        `since` is the number of images at the previous checkpoint.
        """
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        trainer, folder = self.spec.settings.trainer, self.spec.folder
        self._idle.wait()  # or slow storage would let vectors accumulate in memory
        self._idle.clear()
        if self._layout is None:
            self._layout = engine.layout()
        vectors = engine.snapshot() if self._layout.fragments[self.rank] else {}
        milestone = trainer.milestone_every is not None and self._due(cursor, since, trainer.milestone_every)
        placeholder = {trainer.select_by: WORST} if trainer.select_by else {}
        ray.train.report({"images": cursor.images, **placeholder}, Checkpoint(scratch.staging_dir(folder)),
                         checkpoint_dir_name=checkpoint.directory_name(cursor.images),
                         checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                         checkpoint_upload_fn=functools.partial(self._write, folder, vectors, cursor, milestone),
                         validation=self._validation_task(cursor, since) if self.rank == 0 else False)

    def _due(self, cursor: Cursor, since: int, every: int | None) -> bool:
        return (cursor.images == self.spec.settings.trainer.images or every is None
                or since // every != cursor.images // every)

    def _validation_task(self, cursor: Cursor, since: int) -> Any:
        """Arguments of the checkpoint's validation; False if none is due, or if another still runs.

        Ray Train would queue it and keep its checkpoint. The last checkpoint is always validated.
        """
        from ray.train.v2.api.validation_config import ValidationTaskConfig

        settings, folder, now = self.spec.settings.validate, self.spec.folder, time.monotonic()
        if not settings.images or not self._due(cursor, since, settings.every):
            return False
        if self._validation and cursor.images < self.spec.settings.trainer.images:
            images, start = self._validation
            if now - start < settings.max_seconds and not validate.validation_at(folder, images):
                return False
        self._validation = cursor.images, now
        frechet = settings.frechet_images > 0 and self._due(cursor, since, settings.frechet_every)
        return ValidationTaskConfig(fn_kwargs={"frechet": frechet}, timeout_s=settings.max_seconds)

    def _write(self, folder: Folder, vectors: Tensors, cursor: Cursor, milestone: bool, empty: Any, name: str) -> Any:
        """Write this worker's files to checkpoints/, and to milestones/ if it is one; runs in a thread.

        Ray calls it again if it raises, and removes `empty`.
        """
        from ray.train import Checkpoint

        assert self._layout is not None
        kept = folder / "checkpoints" / name
        try:
            for target in (kept, folder / "milestones" / name) if milestone else (kept,):
                checkpoint.write_vectors(target, self.rank, vectors)
                if self.rank == 0:
                    checkpoint.write_state(target, self._layout, cursor)
            return Checkpoint(kept.path, kept.filesystem)
        finally:
            self._idle.set()
