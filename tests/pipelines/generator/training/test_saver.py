"""One checkpoint is written at a time, whatever fails; one is validated at a time, however fast the training is."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from cluster.storage import Folder
from pipelines.generator.training import checkpoint, saver, validate
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.sharded_state import Fragment

LAYOUT = Layout(["model"], {"w": [4]}, [[Fragment("w", 0, 0, 4)]])


@pytest.fixture
def reports(monkeypatch):
    """What Ray Train would be given: the arguments of every report."""
    import ray.train

    given = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, staged, **arguments: given.append((staged, arguments)))
    return given


@pytest.fixture
def save(tiny, tmp_path):
    """Saves a checkpoint at so many of 1,000 images."""
    settings = tiny("validate.images=8", "validate.every=null", "trainer.images=1000")
    spec = TrainingSpec(settings, "f", Folder(str(tmp_path / "train")), Folder(""), None, [0.0], [1.0])
    saving = saver.CheckpointSaver(spec, 0)
    engine = SimpleNamespace(layout=lambda: LAYOUT, snapshot=lambda: {"model": torch.ones(4)})

    def save_at(images: int) -> None:
        saving(engine, Cursor(images, images, "f"), images - 64)

    save_at.folder, save_at.settings = spec.folder, settings
    return save_at


def upload(report):
    staged, arguments = report
    return arguments["checkpoint_upload_fn"](staged, arguments["checkpoint_dir_name"])


def test_none_is_validated_while_another_is_but_the_last_always(save, reports):
    for images in (64, 128, 192):
        save(images)
        upload(reports[-1])
    assert [bool(arguments["validation"]) for _, arguments in reports] == [True, False, False]
    validate.append_validation(save.folder, {"images": 64, "val_loss": 0.5})
    for images in (256, 320, 1000):
        save(images)
        upload(reports[-1])
    assert [bool(arguments["validation"]) for _, arguments in reports[3:]] == [True, False, True]


def test_a_validation_that_hangs_holds_up_the_next_for_a_time_only(save, reports):
    save.settings.validate.max_seconds = 1e-9
    for images in (64, 128):
        save(images)
        upload(reports[-1])
    assert all(arguments["validation"] for _, arguments in reports)


def test_an_upload_that_is_tried_again_lets_one_checkpoint_through(save, reports, monkeypatch):
    save(64)
    following = threading.Thread(target=save, args=(128,), daemon=True)
    following.start()
    following.join(0.2)
    assert len(reports) == 1, "the second waits for the first"
    with monkeypatch.context() as faulty:
        faulty.setattr(checkpoint, "write_vectors", lambda *_: (_ for _ in ()).throw(OSError("the storage is away")))
        for _ in range(2):
            with pytest.raises(OSError, match="away"):
                upload(reports[0])
    following.join(10)
    assert len(reports) == 2
    third = threading.Thread(target=save, args=(192,), daemon=True)
    third.start()
    third.join(0.2)
    assert len(reports) == 2, "the third waits for the second, though the first was tried twice"
    upload(reports[1])
    third.join(10)
    assert len(reports) == 3
    assert checkpoint.latest_complete(save.folder / "checkpoints").path.endswith(checkpoint.directory_name(128))
