"""Checkpoints under Ray Train: each worker writes its own part in the background; validated beside the training.

However fast the cluster trains, one checkpoint is written at a time, and one is validated.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

from cluster import scratch
from pipelines.generator.training import checkpoint
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.deepspeed import DeepSpeedTrainer
from pipelines.generator.training.ema import STORED, average_name
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.sharded_state import Tensors

SNAPSHOTS = "snapshots"  # folder of the EMAs before the end of training: checkpoints without the other parts
WORST = 1e30  # reported for a checkpoint not yet validated: without it Ray would rank it best and delete validated ones


class CheckpointSaver:
    """Saves the checkpoints of one worker's training."""

    def __init__(self, spec: TrainingSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self._idle = threading.Event()  # no checkpoint is being written
        self._idle.set()
        self._layout: Layout | None = None
        self._validated: int | None = None  # images at the last validation that was asked for
        self._measured = 0  # images at the last one with a Fréchet distance

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
        snapshot = not self._is_last(cursor) and self._due(cursor, since, trainer.snapshot_every)
        placeholder = {trainer.select_by: WORST} if trainer.select_by else {}
        ray.train.report({"images": cursor.images, **placeholder}, Checkpoint(scratch.staging_dir(folder)),
                         checkpoint_dir_name=checkpoint.directory_name(cursor.images),
                         checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                         checkpoint_upload_fn=functools.partial(self._write, vectors, cursor, milestone, snapshot),
                         validation=self._validation_task(cursor, since) if self.rank == 0 else False)

    def _due(self, cursor: Cursor, since: int, every: int | None) -> bool:
        return self._is_last(cursor) or every is None or since // every != cursor.images // every

    def _is_last(self, cursor: Cursor) -> bool:
        return cursor.images == self.spec.settings.trainer.images

    def _validation_task(self, cursor: Cursor, since: int) -> Any:
        """Arguments of the checkpoint's validation; False if none is due, or while another runs: it is then postponed.

        Ray Train would queue it and keep its checkpoint. The last checkpoint is always validated.
        """
        from ray.train.v2.api.validation_config import ValidationTaskConfig

        settings = self.spec.settings.validate
        if self._validated is None:  # the first checkpoint of this worker
            self._validated = self._measured = since
        if not settings.images or not self._due(cursor, self._validated, settings.every):
            return False
        if not self._is_last(cursor) and self._is_validating():
            return False
        frechet = settings.frechet_images > 0 and self._due(cursor, self._measured, settings.frechet_every)
        self._validated, self._measured = cursor.images, cursor.images if frechet else self._measured
        return ValidationTaskConfig(fn_kwargs={"frechet": frechet}, timeout_s=settings.max_seconds)

    def _is_validating(self) -> bool:
        """Whether Ray Train validates a checkpoint, of this worker or of one before it."""
        import ray.train
        from ray.train.v2.api.report_config import CheckpointConsistencyMode
        from ray.train.v2.api.reported_checkpoint import ReportedCheckpointStatus

        reported = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, timeout_s=0)
        unknown = (self._validated or 0) > max((one.metrics["images"] for one in reported), default=0)
        return unknown or any(one.status is ReportedCheckpointStatus.PENDING_VALIDATION for one in reported)

    def _write(self, vectors: Tensors, cursor: Cursor, milestone: bool, snapshot: bool, empty: Any, name: str) -> Any:
        """Write this worker's files to checkpoints/, to milestones/ and to snapshots/ if it is one; runs in a thread.

        If it raises, Ray either calls it again, with the same vectors, or ends the worker.
        """
        from ray.train import Checkpoint

        assert self._layout is not None
        folder, targets = self.spec.folder, []
        if snapshot:
            averages = replace(self._layout, parts=[average_name(length) for length in STORED])
            targets.append((folder / SNAPSHOTS / name, averages))
        if milestone:
            targets.append((folder / "milestones" / name, self._layout))
        kept = folder / "checkpoints" / name
        for target, layout in (*targets, (kept, self._layout)):  # last: none is resumed from without its snapshot
            if vectors:
                checkpoint.write_vectors(target, layout, self.rank, {part: vectors[part] for part in layout.parts})
            if self.rank == 0:
                checkpoint.write_state(target, layout, cursor)
        self._idle.set()
        return Checkpoint(kept.path, kept.filesystem)
