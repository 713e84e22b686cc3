"""Portable checkpoints: whole tensors by parameter name in safetensors, and a small JSON beside them.

A checkpoint is the same for any number of workers and any ZeRO stage, and holds no pickle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.generator.training.sharded_state import Tensors

STATE = "state.json"
PREFIX = "images-"


@dataclass(frozen=True)
class Cursor:
    """How far training is, and what it is the training of."""

    images: int
    steps: int
    fingerprint: str
    scaler: dict[str, Any] = field(default_factory=dict)  # fp16's loss scaling


def name(images: int) -> str:
    """Directory name of a checkpoint; names sort by images."""
    return f"{PREFIX}{images:012d}"


def images_of(name: str) -> int:
    """Images seen, by a checkpoint's directory name."""
    return int(name.removeprefix(PREFIX))


def save(folder: Path, state: dict[str, Tensors], cursor: Cursor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in state.items():
        save_file(tensors, folder / f"{part}.safetensors")
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    (folder / STATE).write_text(json.dumps({**vars(cursor), "sizes": sizes}))


def load(folder: Path, fingerprint: str) -> tuple[dict[str, Tensors], Cursor]:
    """The state and cursor of a checkpoint.  Raises UserError when it is of another training."""
    cursor = cursor_of(Folder(str(folder)))
    if cursor.fingerprint != fingerprint:
        raise UserError(f"{folder} is a checkpoint of other settings or inputs ({cursor.fingerprint}, "
                         f"not {fingerprint}); add changed=redo to start anew, or choose another name=")
    return {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}, cursor


def read_part(folder: Folder, part: str) -> Tensors:
    """One part of the state of a checkpoint, such as its model or one average, wherever it lies."""
    return load_bytes(folder.read(f"{part}.safetensors"))


def cursor_of(folder: Folder) -> Cursor:
    """How far the training was at a checkpoint, wherever that lies."""
    state = json.loads(folder.read(STATE))
    return Cursor(state["images"], state["steps"], state["fingerprint"], state["scaler"])


def newest_whole(checkpoints: Folder) -> Folder | None:
    """The last checkpoint below `checkpoints` of which every file is there in full, or None."""
    for name in reversed(checkpoints.names()):
        if name.startswith(PREFIX) and _is_whole(checkpoints / name):
            return checkpoints / name
    return None


def _is_whole(folder: Folder) -> bool:
    try:
        state = json.loads(folder.read(STATE))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return all(folder.size(file) == size for file, size in state["sizes"].items())
