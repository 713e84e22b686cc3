"""What training goes on from, whatever was being written when it was killed."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster import scratch
from cluster.storage import Folder
from pipelines.generator.training import checkpoint
from pipelines.generator.training.ray_train import SNAPSHOT, earlier_checkpoint, remove_unregistered
from pipelines.generator.training.saver import WORST
from pipelines.generator.training.settings import TrainerSettings
from pipelines.generator.training.sharded_state import Fragment
from pipelines.generator.training.stage import best_checkpoint
from pipelines.generator.training.validate import append_validation, validation_at


@pytest.fixture
def checkpoints(tmp_path):
    for images in (64, 128):
        save(Folder(str(tmp_path / checkpoint.directory_name(images))), images)
    return Folder(str(tmp_path))


SHAPES = {"a": [10, 30], "b": [7], "c": [500]}
WHOLE = torch.cat([torch.arange(math.prod(shape), dtype=torch.float32) for shape in SHAPES.values()])


def cut(world: int, padding: int = 0) -> list[list[Fragment]]:
    """Fragments of workers that hold equal shares of all parameters laid end to end, as under ZeRO 1 and 2, each after
    so many elements of padding."""
    size, held = -(-len(WHOLE) // world), []
    for rank in range(world):
        held.append([])
        begin = 0
        for name, shape in SHAPES.items():
            first, end = max(rank * size, begin), min((rank + 1) * size, begin + math.prod(shape))
            if first < end:
                held[-1].append(Fragment(name, first - begin, padding + first - rank * size, end - first))
            begin += math.prod(shape)
    return held


def vector(held: list[Fragment], numel: int, scale: float) -> torch.Tensor:
    found = torch.full((numel,), -1.0)
    for _, start, offset, count in held:
        found[offset : offset + count] = scale * torch.arange(start, start + count)
    return found


def save(folder: Folder, images: int, world: int = 2, padding: int = 3) -> None:
    layout = checkpoint.Layout(["model", "ema"], SHAPES, cut(world, padding))
    for rank, held in enumerate(layout.fragments):
        vectors = {"model": vector(held, 900, images), "ema": vector(held, 900, 1)}
        checkpoint.write_vectors(folder, layout, rank, vectors)
    checkpoint.write_state(folder, layout, checkpoint.Cursor(images, images // 32, "print", {"cur_scale": 2.0}))


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("at_a_time", [4 * 16, checkpoint.READ_BYTES])
def test_any_number_of_workers_reads_what_any_number_wrote(tmp_path, monkeypatch, world, at_a_time):
    monkeypatch.setattr(checkpoint, "READ_BYTES", at_a_time)
    folder = Folder(str(tmp_path))
    save(folder, 128, world)
    assert checkpoint.read_cursor(folder) == checkpoint.Cursor(128, 4, "print", {"cur_scale": 2.0})
    whole = checkpoint.read_part(folder, "model")
    assert {name: list(value.shape) for name, value in whole.items()} == SHAPES
    assert torch.equal(torch.cat([value.flatten() for value in whole.values()]), 128 * WHOLE)
    for readers in (1, 2, 3):
        for held in cut(readers):
            expected = vector(held, 900, 1)
            found = checkpoint.read_vector(folder, checkpoint.read_layout(folder), "ema", held, 900)
            assert torch.equal(torch.where(expected < 0, 0, expected), found)


def test_a_workers_file_is_a_safetensors_file(tmp_path):
    save(Folder(str(tmp_path)), 1)
    [file] = tmp_path.glob("model-00001-*.safetensors")
    assert torch.equal(load_file(file)["model"], vector(cut(2, 3)[1], 900, 1))


def test_few_requests_read_a_checkpoint_of_many_workers(tmp_path, monkeypatch):
    """As under ZeRO-3, where every worker holds a slice of every parameter."""
    shapes = {f"{k}.weight": [3_000] for k in range(100)}
    fragments = [[Fragment(name, 1_000 * rank, 1_002 * k, 1_000) for k, name in enumerate(shapes)] for rank in range(3)]
    folder, layout = Folder(str(tmp_path)), checkpoint.Layout(["model"], shapes, fragments)
    for rank, held in enumerate(fragments):
        checkpoint.write_vectors(folder, layout, rank, {"model": vector(held, 100_200, 1)})
    checkpoint.write_state(folder, layout, checkpoint.Cursor(64, 2, "print"))
    requests = list(checkpoint._requests(checkpoint._copies(layout, [Fragment(n, 0, 0, 3_000) for n in shapes])))
    assert len(requests) == 3
    assert all(torch.equal(value, torch.arange(3_000.0)) for value in checkpoint.read_part(folder, "model").values())
    monkeypatch.setattr(checkpoint, "MAX_GAP", 0)
    assert all(torch.equal(value, torch.arange(3_000.0)) for value in checkpoint.read_part(folder, "model").values())


def test_files_of_an_attempt_with_another_number_of_workers_do_not_complete_a_checkpoint(tmp_path):
    folder = Folder(str(tmp_path)) / checkpoint.directory_name(64)
    save(folder, 64, world=3)
    layout = checkpoint.Layout(["model", "ema"], SHAPES, cut(2))
    checkpoint.write_vectors(folder, layout, 0, {"model": WHOLE, "ema": WHOLE})
    checkpoint.write_state(folder, layout, checkpoint.Cursor(64, 2, "print"))
    assert checkpoint.latest_complete(Folder(str(tmp_path))) is None


def test_a_checkpoint_of_another_training_is_refused(checkpoints):
    with pytest.raises(ValueError, match="other settings"):
        checkpoint.check_fingerprint(checkpoints / checkpoint.directory_name(128), "another")


def test_what_a_killed_attempt_left_aside_is_swept_and_what_others_write_stays(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine, other = scratch.staging_dir(checkpoints), scratch.staging_dir(checkpoints / "other")
    with monkeypatch.context() as elsewhere:  # another node of the run, whose temporary folder is on the same disk
        elsewhere.setattr("socket.gethostname", lambda: "other-node")
        theirs = scratch.staging_dir(checkpoints)
    scratch.sweep(checkpoints)
    assert not Path(mine).exists()
    assert Path(other).exists()
    assert Path(theirs).exists()


def test_the_newest_whole_checkpoint_is_found(checkpoints, tmp_path):
    assert checkpoint.latest_complete(checkpoints).uri.endswith(checkpoint.directory_name(128))
    next((tmp_path / checkpoint.directory_name(128)).glob("ema-00001-*")).unlink()
    assert checkpoint.latest_complete(checkpoints).uri.endswith(checkpoint.directory_name(64))
    next((tmp_path / checkpoint.directory_name(64)).glob("model-00000-*")).unlink()
    assert checkpoint.latest_complete(checkpoints) is None


@pytest.mark.parametrize("uploaded", [b"", b'{"images": 12', b'{"images": 128}'])
def test_a_checkpoint_whose_state_is_not_yet_there_is_not_whole(checkpoints, tmp_path, uploaded):
    (tmp_path / checkpoint.directory_name(128) / checkpoint.STATE).write_bytes(uploaded)
    assert checkpoint.latest_complete(checkpoints).uri.endswith(checkpoint.directory_name(64))


def test_checkpoints_that_ray_does_not_know_are_removed_if_training_is_beyond_them(checkpoints, tmp_path):
    newer = checkpoints / checkpoint.directory_name(192)
    save(newer, 192)
    latest = checkpoints / checkpoint.directory_name(128)
    remove_unregistered(checkpoints, latest)
    assert len(checkpoint.list_checkpoints(checkpoints)) == 3, "Ray's list is not there"
    (tmp_path / SNAPSHOT).write_text('{"checkpoint_results": [{"checkpoint_dir_name": "images-000000000128"}]}')
    remove_unregistered(checkpoints, latest)
    assert [folder.path for folder in checkpoint.list_checkpoints(checkpoints)] == [latest.path, newer.path]


def test_rays_own_list_is_believed_where_it_is_whole(checkpoints, tmp_path):
    (tmp_path / SNAPSHOT).write_text('{"checkpoint_results": []}')
    assert earlier_checkpoint(checkpoints) is None
    assert (tmp_path / SNAPSHOT).exists()


@pytest.mark.parametrize("left", [None, "", '{"checkpoint_res'])
def test_half_of_rays_list_is_removed_and_the_newest_whole_checkpoint_taken(checkpoints, tmp_path, left):
    if left is not None:
        (tmp_path / SNAPSHOT).write_text(left)
    assert earlier_checkpoint(checkpoints).uri.endswith(checkpoint.directory_name(128))
    assert not (tmp_path / SNAPSHOT).exists()


def test_the_best_of_the_checkpoints_that_are_left_is_found(tmp_path):
    folder = Folder(str(tmp_path))
    for images in (128, 192):
        save(folder / "checkpoints" / checkpoint.directory_name(images), images)
    for images, loss in ((64, 0.1), (128, 0.2), (192, 0.3)):
        append_validation(folder, {"images": images, "val_loss": loss})
    assert best_checkpoint(folder, TrainerSettings(images=1)) is None
    best = best_checkpoint(folder, TrainerSettings(images=1, select_by="val_loss"))
    assert best.uri.endswith(checkpoint.directory_name(128))
    assert best_checkpoint(folder, TrainerSettings(images=1, select_by="val_frechet")) is None


def test_what_was_measured_of_a_checkpoint_that_was_made_again_is_replaced(tmp_path):
    folder = Folder(str(tmp_path))
    for images, loss in ((64, 0.1), (128, 0.2), (64, 0.3)):
        append_validation(folder, {"images": images, "val_loss": loss})
    assert validation_at(folder, 64) == {"images": 64, "val_loss": 0.3}
    assert validation_at(folder, 128) == {}


def test_ray_keeps_the_best_of_the_measured_checkpoints(tmp_path):
    """Ray takes a checkpoint without the metric for the best; what we report of it beforehand is the worst."""
    from ray.train import Checkpoint, CheckpointConfig
    from ray.train._internal.session import _TrainingResult
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager

    manager = CheckpointManager.__new__(CheckpointManager)
    manager._checkpoint_config = CheckpointConfig(2, "val_loss", "min")
    scores = {name: manager._get_checkpoint_score(_TrainingResult(Checkpoint(str(tmp_path)), metrics))
              for name, metrics in (("good", {"val_loss": 0.1}), ("bad", {"val_loss": 0.5}),
                                    ("unmeasured", {"val_loss": WORST}))}
    assert sorted(scores, key=scores.get) == ["unmeasured", "bad", "good"]
