"""Portable checkpoints: full tensors by parameter name in safetensors, and a small JSON.

A checkpoint is the same for any number of workers and any ZeRO stage, and holds no pickle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from torch import nn

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.generator.training.sharded_state import Tensors

STATE = "state.json"
PREFIX = "images-"


@dataclass(frozen=True)
class Cursor:
    """Progress of a training run, and the fingerprint of its settings and inputs."""

    images: int
    steps: int
    fingerprint: str
    scaler: dict[str, Any] = field(default_factory=dict)  # state of fp16 loss scaling


def directory_name(images: int) -> str:
    """Directory name of a checkpoint; names sort by images."""
    return f"{PREFIX}{images:012d}"


def images_seen(folder: Folder) -> int:
    """Images seen at a checkpoint, from its directory name."""
    return int(Path(folder.path).name.removeprefix(PREFIX))


def save(folder: Path, state: dict[str, Tensors], cursor: Cursor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in state.items():
        save_file(tensors, folder / f"{part}.safetensors")
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    (folder / STATE).write_text(json.dumps({**vars(cursor), "sizes": sizes}))


def load(folder: Path, fingerprint: str) -> tuple[dict[str, Tensors], Cursor]:
    """The state and cursor of a checkpoint.  Raises UserError if its fingerprint differs."""
    cursor = read_cursor(Folder(str(folder)))
    if cursor.fingerprint != fingerprint:
        raise UserError(f"{folder} is a checkpoint of other settings or inputs ({cursor.fingerprint}, "
                         f"not {fingerprint}); add changed=redo to start from scratch, or choose another name=")
    return {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}, cursor


def read_part(folder: Folder, part: str) -> Tensors:
    """One part of a checkpoint's state, such as the model or one EMA, from local or remote storage."""
    return load_bytes(folder.read(f"{part}.safetensors"))


def read_cursor(folder: Folder) -> Cursor:
    """The cursor of a checkpoint in local or remote storage."""
    state = json.loads(folder.read(STATE))
    return Cursor(state["images"], state["steps"], state["fingerprint"], state["scaler"])


def list_checkpoints(checkpoints: Folder) -> list[Folder]:
    """All checkpoints below a folder, complete or not, in the order of their images."""
    return [checkpoints / name for name in checkpoints.names() if name.startswith(PREFIX)]


def latest_complete(checkpoints: Folder) -> Folder | None:
    """The last checkpoint below `checkpoints` whose files are all present at their full size, or None."""
    return next((folder for folder in reversed(list_checkpoints(checkpoints)) if _is_complete(folder)), None)


def _is_complete(folder: Folder) -> bool:
    try:
        state = json.loads(folder.read(STATE))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return all(folder.size(file) == size for file, size in state["sizes"].items())


def load_checked_weights(module: nn.Module, tensors: Tensors) -> None:
    """Load weights; raises RuntimeError if any is missing, unknown, of another shape or not finite."""
    expected = {name: value.shape for name, value in module.state_dict().items()}
    stored = {name: value.shape for name, value in tensors.items()}
    if stored != expected:
        differing = sorted(expected.items() ^ stored.items())
        raise RuntimeError(f"the checkpoint differs from the network in {differing[:3]}")
    non_finite = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if non_finite:
        raise RuntimeError(f"the checkpoint is not finite in {non_finite[:3]}")
    module.load_state_dict(tensors)
