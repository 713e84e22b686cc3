"""One checkpoint is written at a time, whatever fails; one is validated at a time, however fast the training is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.train.v2.api.reported_checkpoint import ReportedCheckpointStatus

from cluster.storage import Folder
from pipelines.generator.training import checkpoint, saver
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.ema import STORED, average_name
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.sharded_state import Fragment

COMMITTED, PENDING_VALIDATION, VALIDATED, VALIDATION_TIMEOUT = (
    ReportedCheckpointStatus[name] for name in ("COMMITTED", "PENDING_VALIDATION", "VALIDATED", "VALIDATION_TIMEOUT"))
LAYOUT = Layout(["model"], {"w": [4]}, [[Fragment("w", 0, 0, 4)]])


@pytest.fixture
def reports(monkeypatch):
    """What Ray Train would be given: the arguments of every report."""
    import ray.train

    given = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, staged, **arguments: given.append((staged, arguments)))
    return given


@pytest.fixture
def known(monkeypatch):
    """The checkpoints that Ray Train has registered, by images, and the state of their validation."""
    import ray.train

    registered = {}
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda mode, timeout_s: [
        SimpleNamespace(metrics={"images": images}, status=status) for images, status in registered.items()])
    return registered


@pytest.fixture
def save(tiny, tmp_path):
    """Saves a checkpoint at so many of 1,000 images."""
    settings = tiny("validate.images=8", "validate.every=null", "trainer.images=1000")
    spec = TrainingSpec(settings, "f", Folder(str(tmp_path / "train")), Folder(""), None, [0.0], [1.0])
    saving = saver.CheckpointSaver(spec, 0)
    vector = torch.empty(4)
    engine = SimpleNamespace(layout=lambda: LAYOUT, snapshot=lambda: {"model": vector})

    def save_at(images: int, parts: Sequence[str] = ("model",)) -> None:
        engine.snapshot = lambda: dict.fromkeys(parts, vector.fill_(images))
        saving(engine, Cursor(images, images, "f"), images - 64)

    save_at.folder, save_at.settings, save_at.saving = spec.folder, settings, saving
    return save_at


def upload(report):
    staged, arguments = report
    return arguments["checkpoint_upload_fn"](staged, arguments["checkpoint_dir_name"])


def asked(reports) -> list[int]:
    """The numbers of the reports that asked for a validation."""
    return [k for k, (_, arguments) in enumerate(reports) if arguments["validation"]]


def test_none_is_validated_while_another_is_but_the_last_always(save, reports, known):
    for images, before in ((64, {}), (128, {}), (192, {64: PENDING_VALIDATION}), (256, {64: VALIDATED}),
                           (320, {256: VALIDATION_TIMEOUT, 320: COMMITTED}), (384, {320: PENDING_VALIDATION}),
                           (1000, {320: PENDING_VALIDATION})):
        known |= before
        save(images)
        upload(reports[-1])
    assert asked(reports) == [0, 3, 4, 6], "not of 128: that of 64 is not registered yet"


def test_a_validation_that_is_not_due_or_postponed_comes_with_a_later_checkpoint(save, reports, known):
    save.settings.validate.every, save.settings.validate.frechet_every = 100, 200
    save.settings.validate.frechet_images = 8
    for images, status in ((64, COMMITTED), (128, PENDING_VALIDATION), (256, PENDING_VALIDATION), (280, VALIDATED),
                           (290, VALIDATED), (320, VALIDATED)):
        save(images)
        upload(reports[-1])
        known[128 if images == 256 else images] = status
        if images == 256:
            known[128] = VALIDATED
    assert asked(reports) == [1, 3, 5]
    frechet = [arguments["validation"].fn_kwargs["frechet"] for _, arguments in reports if arguments["validation"]]
    assert frechet == [False, True, False], "it was due at 200, while another ran"


def test_a_worker_that_starts_anew_waits_for_the_validation_of_the_one_before(save, reports, known):
    known[64] = PENDING_VALIDATION
    save(128)
    assert asked(reports) == []


def started(save, images: int) -> threading.Thread:
    """Saves a checkpoint in a thread, which is given the time to come to where it must wait."""
    thread = threading.Thread(target=save, args=(images,), daemon=True)
    thread.start()
    thread.join(0.2)
    return thread


def test_an_upload_that_is_tried_again_writes_its_own_numbers_and_lets_one_checkpoint_through(save, reports, known,
                                                                                              monkeypatch):
    save(64)
    with monkeypatch.context() as faulty:
        faulty.setattr(checkpoint, "write_vectors", lambda *_: (_ for _ in ()).throw(OSError("the storage is away")))
        for _ in range(2):
            with pytest.raises(OSError, match="away"):
                upload(reports[0])
    following = started(save, 128)
    assert len(reports) == 1, "the second waits for the first, whose vectors it would overwrite"
    upload(reports[0])
    following.join(10)
    assert len(reports) == 2
    kept = save.folder / "checkpoints" / checkpoint.directory_name(64)
    assert torch.equal(checkpoint.read_part(kept, "model")["w"], torch.full((4,), 64.0))
    third = started(save, 192)
    assert len(reports) == 2, "the third waits for the second, though the first was tried three times"
    upload(reports[1])
    third.join(10)
    assert len(reports) == 3
    assert checkpoint.latest_complete(save.folder / "checkpoints").path.endswith(checkpoint.directory_name(128))


def test_snapshots_hold_the_averages_and_are_written_before_the_checkpoint(save, reports, known, monkeypatch):
    save.settings.trainer.ema_snapshots, written = 4, []
    parts = ["model", *map(average_name, STORED)]
    monkeypatch.setattr(checkpoint, "write_vectors", lambda folder, layout, rank, vectors: written.append(
        (Path(folder.path).parent.name, checkpoint.images_seen(folder), sorted(vectors))))
    save.saving._layout = Layout(parts, {"w": [4]}, [[Fragment("w", 0, 0, 4)]])
    for images in (192, 256, 448, 512, 1000):
        save(images, parts)
        upload(reports[-1])
    averages = sorted(parts[1:])
    assert [line for line in written if line[0] == "snapshots"] == [
        ("snapshots", 256, averages), ("snapshots", 512, averages)], "the end is the last checkpoint's"
    assert written.index(("snapshots", 512, averages)) < written.index(("checkpoints", 512, sorted(parts)))
