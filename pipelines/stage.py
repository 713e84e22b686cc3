"""What a stage is given, what it leaves behind, and when its work is already done.

A stage that ran to its end leaves `stage.json`; one that began leaves `begun.json`. Both carry the fingerprint of the
settings and inputs it was made from, so nothing half-written and nothing of other settings is ever taken for its
result.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data.split import salt_check
from pipelines.memory import PeakMemory
from pipelines.progress import say
from pipelines.settings import Settings, outcome_settings

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """The arguments of a stage function: its folder, its inputs' folders, the settings and the cluster."""

    name: str
    settings: Settings
    resources: Resources
    fingerprint: str

    @property
    def folder(self) -> Folder:
        return run_folder(self.settings) / self.name

    def input(self, stage: str) -> Folder:
        assert stage in self.settings.graph[self.name].needs, f"{self.name} does not declare that it needs {stage}"
        return run_folder(self.settings) / stage

    def record_of(self, stage: str) -> dict[str, Any]:
        """stage.json of a stage that this one needs."""
        record = self.input(stage).read_json("stage.json")
        assert record is not None, f"{stage} has no stage.json"
        return record

    def metrics_of(self, stage: str) -> Metrics:
        """The figures of a stage that this one needs."""
        return self.record_of(stage)["metrics"]


def run_folder(settings: Settings) -> Folder:
    return Folder(settings.storage) / settings.name


class Plan:
    """Fingerprints of all stages under the present settings, and what of their work is on disk."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = run_folder(settings)

    def chosen(self, stage: str) -> dict[str, Any]:
        """The settings, by key, that shape the result of `stage`."""
        values: dict[str, Any] = {"seed": self.settings.seed}
        for section in self.settings.graph[stage].settings:
            for key, value in outcome_settings(getattr(self.settings, section)).items():
                values[f"{section}.{key}"] = value
        if "data" in self.settings.graph[stage].settings:
            values["data.contents"] = self._contents
            values["data.salt"] = salt_check()
        return values

    @cached_property
    def _contents(self) -> str | None:
        from pipelines.data.sources import find_source

        return find_source(self.settings.data.source).contents(self.settings.data)

    def fingerprint(self, stage: str) -> str:
        inputs = {need: self.fingerprint(need) for need in self.settings.graph[stage].needs}
        text = json.dumps([stage, self.chosen(stage), inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def record(self, stage: str) -> dict[str, Any] | None:
        """stage.json of a finished stage."""
        return (self.folder / stage).read_json("stage.json")

    def is_done(self, stage: str) -> bool:
        record = self.record(stage)
        return record is not None and record["fingerprint"] == self.fingerprint(stage)

    def differences(self, stage: str) -> str:
        """In words, why what lies in the stage's folder is not what the present settings ask for."""
        folder = self.folder / stage
        begun = folder.read_json("begun.json") or folder.read_json("stage.json")
        if begun is None:
            return "only a part of it is left"
        before, now = begun.get("settings", {}), json.loads(json.dumps(self.chosen(stage), default=str))
        changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        return ", ".join(f"{k} {before.get(k)} → {now.get(k)}" for k in changed) or "its inputs changed"

    def is_stale(self, stage: str) -> bool:
        """Whether the stage's folder holds work, finished or not, of other settings or inputs."""
        folder = self.folder / stage
        begun = folder.read_json("begun.json") or folder.read_json("stage.json")
        if begun is None:  # `begin` writes before any stage does, so a clearing that was cut off has left this
            return bool(folder.names())
        return begun["fingerprint"] != self.fingerprint(stage)

    def check_inputs(self, stage: str) -> None:
        """Raise ValueError naming the first input that is missing or of other settings."""
        for need in self.settings.graph[stage].needs:
            if self.is_done(need):
                continue
            why = f"was made with other settings ({self.differences(need)})" if self.is_stale(need) else "is not there"
            raise ValueError(f"{stage} needs {need}, which {why} in {self.folder.uri}; "
                             f"run `rayograph {need}` or `rayograph run` with the same settings first")

    def check_stale(self, stage: str, *, redo: bool) -> None:
        """Raise ValueError when the stage's folder holds work of other settings that may not be replaced."""
        if self.is_stale(stage) and not redo:
            raise ValueError(f"{(self.folder / stage).uri} was made with other settings ({self.differences(stage)}); "
                             "add changed=redo to replace it, or choose another name=")

    def begin(self, stage: str, *, redo: bool) -> None:
        """Make the stage's folder ready: go on where the same work was cut off, clear work of other settings."""
        folder = self.folder / stage
        self.check_stale(stage, redo=redo)
        if self.is_stale(stage):
            say(f"{stage}: {self.differences(stage)}; starts anew")
            self._disown(stage)
            folder.clear()
        if not folder.exists("begun.json"):
            for follower in self._followers(stage):
                self._disown(follower)
        folder.write_json("begun.json", {"fingerprint": self.fingerprint(stage), "settings": self.chosen(stage)})

    def _disown(self, stage: str) -> None:
        """Have the work in a stage's folder count as no one's, so that it is cleared before anything else is done."""
        for name in ("stage.json", "begun.json"):
            (self.folder / stage).remove(name)

    def _followers(self, stage: str) -> list[str]:
        """The stages that need `stage`, directly or not: what they made is not of what it is about to make."""
        def needs(other: str) -> bool:
            return any(need == stage or needs(need) for need in self.settings.graph[other].needs)

        return [other for other in self.settings.graph if needs(other)]

    def execute(self, stage: str, resources: Resources) -> dict[str, Any]:
        """Run the stage's function and commit its stage.json.  Returns the record."""
        spec = self.settings.graph[stage]
        context = Stage(stage, self.settings, resources, self.fingerprint(stage))
        started = time.time()
        with PeakMemory() as memory:
            metrics = _load(spec.run)(context)
        metrics |= {"seconds": round(time.time() - started, 2), "peak_rss_mb": memory.peak_mb}
        record = {
            "stage": stage,
            "fingerprint": context.fingerprint,
            "settings": self.chosen(stage),
            "inputs": {need: self.fingerprint(need) for need in spec.needs},
            "seed": self.settings.seed,
            "code": code_version(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "metrics": metrics,
        }
        context.folder.write_json("stage.json", record)
        return record


def _load(path: str) -> Callable[[Stage], Metrics]:
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


def code_version() -> dict[str, str]:
    """Version of this project, and its commit where it runs from a checkout."""
    try:
        code = {"rayograph": version("rayograph")}
    except PackageNotFoundError:
        code = {"rayograph": "unknown"}
    try:
        commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
                                capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        return code | {"commit": commit}
    except (OSError, subprocess.SubprocessError):
        return code

