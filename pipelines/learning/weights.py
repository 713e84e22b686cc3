"""Saves diffusers models to a stage's folder and loads them, in local or remote storage."""

from __future__ import annotations

import tempfile
from typing import Any, TypeVar

from cluster.storage import Folder

Model = TypeVar("Model")


def save_model(folder: Folder, model: Any) -> None:
    """Write the model's config and safetensors to `folder`/model."""
    with tempfile.TemporaryDirectory() as staging:
        model.save_pretrained(staging, safe_serialization=True)
        (folder / "model").upload(staging)


def load_model(folder: Folder, kind: type[Model]) -> Model:
    """The model of class `kind` written by `save_model` below `folder`, on the CPU, in evaluation mode."""
    with tempfile.TemporaryDirectory() as staging:
        (folder / "model").download(staging)
        return kind.from_pretrained(staging, use_safetensors=True, low_cpu_mem_usage=False).eval()  # type: ignore[attr-defined]
