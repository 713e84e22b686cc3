"""Loggers besides metrics.jsonl: TensorBoard by default, others by `trainer.loggers`.

wandb, MLflow and trackio read their servers, projects and keys from their own environment variables.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.errors import UserError
from cluster.storage import Folder


class MetricLogger(Protocol):
    """Logs metrics by the number of images seen."""

    def log(self, images: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def open_loggers(names: Sequence[str], folder: Folder) -> list[MetricLogger]:
    """The loggers of these names; TensorBoard only for a local folder.  Raises UserError if a package is missing."""
    classes: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Tracker, "trackio": Tracker, "mlflow": MLflow}
    return [classes[name](name, folder) for name in names if name != "tensorboard" or folder.is_local]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"trainer.loggers={name}: the package is not installed (pip install {name})") from error


class TensorBoard:
    def __init__(self, name: str, folder: Folder) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(f"{folder.uri}/{name}")

    def log(self, images: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, images)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """wandb, and trackio, which has the same interface."""

    def __init__(self, name: str, folder: Folder) -> None:
        package = _package(name)
        options = {"dir": folder.uri} if name == "wandb" and folder.is_local else {}
        self._run = package.init(project="rayograph", name=_title(folder), **options)
        self._finish = package.finish
        if name == "wandb":  # validation is logged late, and wandb requires its own step to increase
            self._run.define_metric("*", step_metric="images")

    def log(self, images: int, values: dict[str, float]) -> None:
        self._run.log({"images": images, **values})

    def close(self) -> None:
        self._finish()


class MLflow:
    def __init__(self, name: str, folder: Folder) -> None:
        self._mlflow = _package(name)
        self._mlflow.set_experiment("rayograph")
        self._run = self._mlflow.start_run(run_name=_title(folder)).info.run_id

    def log(self, images: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=images, run_id=self._run)

    def close(self) -> None:
        self._mlflow.end_run()


def _title(folder: Folder) -> str:
    """RUN/STAGE, the title of a run."""
    return "/".join(folder.uri.split("/")[-2:])
