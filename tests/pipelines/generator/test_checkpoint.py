"""What training goes on from, whatever was being written when it was killed."""

import pytest
import torch

from cluster.storage import Folder
from pipelines.generator import checkpoint
from pipelines.generator.train import SNAPSHOT, earlier_checkpoint


@pytest.fixture
def checkpoints(tmp_path):
    for images in (64, 128):
        state = {part: {"w": torch.full((1000,), float(images))} for part in ("model", "ema")}
        checkpoint.save(tmp_path / checkpoint.name(images), state, checkpoint.Cursor(images, images // 32, "print"))
    return Folder(str(tmp_path))


def test_a_checkpoint_is_read_as_it_was_saved(checkpoints, tmp_path):
    state, cursor = checkpoint.load(tmp_path / checkpoint.name(128), "print")
    assert cursor == checkpoint.Cursor(128, 4, "print")
    assert state.keys() == {"model", "ema"}
    assert (state["ema"]["w"] == 128).all()


def test_a_checkpoint_of_another_training_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        checkpoint.load(tmp_path / checkpoint.name(128), "another")


def test_the_newest_whole_checkpoint_is_found(checkpoints, tmp_path):
    assert checkpoint.newest_whole(checkpoints).uri.endswith(checkpoint.name(128))
    cut = tmp_path / checkpoint.name(128) / "ema.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert checkpoint.newest_whole(checkpoints).uri.endswith(checkpoint.name(64))
    (tmp_path / checkpoint.name(64) / "model.safetensors").unlink()
    assert checkpoint.newest_whole(checkpoints) is None


@pytest.mark.parametrize("uploaded", [b"", b'{"images": 12'])
def test_a_checkpoint_whose_state_is_not_yet_there_is_not_whole(checkpoints, tmp_path, uploaded):
    (tmp_path / checkpoint.name(128) / checkpoint.STATE).write_bytes(uploaded)
    assert checkpoint.newest_whole(checkpoints).uri.endswith(checkpoint.name(64))


def test_rays_own_list_is_believed_where_it_is_whole(checkpoints, tmp_path):
    (tmp_path / SNAPSHOT).write_text('{"checkpoint_results": []}')
    assert earlier_checkpoint(checkpoints) is None
    assert (tmp_path / SNAPSHOT).exists()


@pytest.mark.parametrize("left", [None, "", '{"checkpoint_res'])
def test_half_of_rays_list_is_removed_and_the_newest_whole_checkpoint_taken(checkpoints, tmp_path, left):
    if left is not None:
        (tmp_path / SNAPSHOT).write_text(left)
    assert earlier_checkpoint(checkpoints).uri.endswith(checkpoint.name(128))
    assert not (tmp_path / SNAPSHOT).exists()
