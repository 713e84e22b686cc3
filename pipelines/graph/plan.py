"""Which nodes of the graph are finished, begun or stale under the present settings.

A finished node leaves `stage.json`, a node that began leaves `begun.json`. Both carry the fingerprint of the settings,
inputs and observed files, so that neither partial results nor results of other settings are ever mistaken for the
node's. `begun.json` also marks a folder as ours: only folders that contain one are cleared.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import subprocess
import time
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.errors import SetMistake, UserError
from cluster.faults import StorageUnavailable
from cluster.session import Resources
from pipelines.graph.fields import outcome_settings
from pipelines.graph.settings import Settings
from pipelines.graph.stage import Stage, run_folder
from pipelines.monitor.memory import PeakMemory
from pipelines.monitor.progress import say

BEGUN, DONE = "begun.json", "stage.json"
INVALID = "invalid"  # the fingerprint of a folder that is about to be cleared


class Plan:
    """Fingerprints of all nodes under the present settings, and the state of their results in the storage.

    Args:
        settings: of the run.
        looked_at: nodes whose raw data are listed now. For all others `observed` is what it was when they ran, so that
            later stages need the raw data neither online nor listed.
    """

    def __init__(self, settings: Settings, looked_at: Collection[str] = ()) -> None:
        self.settings, self.looked_at = settings, set(looked_at)
        self.folder = run_folder(settings)
        self.fingerprint = functools.cache(self._fingerprint)
        self.observed = functools.cache(self._observed)

    def spec(self, node: str) -> Any:
        return self.settings.stages[self.settings.graph[node].stage]

    def inputs(self, node: str) -> list[str]:
        """The nodes that a node needs, each once."""
        needs = self.settings.graph[node].needs
        return list(dict.fromkeys(need for nodes in needs.values() for need in nodes))

    def chosen(self, node: str) -> dict[str, Any]:
        """The settings, by key, that shape the result of a node."""
        settings = self.settings.of(node)
        values: dict[str, Any] = {"seed": settings.seed} if self.spec(node).seeded else {}
        for name, section in settings.sections.items():
            values |= {f"{name}.{key}": value for key, value in outcome_settings(section).items()}
        return json.loads(json.dumps(values, default=str))

    def _observed(self, node: str) -> dict[str, Any]:
        if self.spec(node).observed is None:
            return {}
        begun = self.begun(node) or {}
        if node not in self.looked_at:
            return begun.get("observed", {})
        try:
            return _load(self.spec(node).observed)(self.settings.of(node))
        except SetMistake:
            raise
        except (UserError, StorageUnavailable) as error:
            if self.record(node) is None:
                raise
            say(f"{node}: {error}; going on with what it made before")
            return begun.get("observed", {})

    def _fingerprint(self, node: str) -> str:
        spec, needs = self.spec(node), self.settings.graph[node].needs
        inputs = {role: [self.fingerprint(need) if len(nodes) == 1 else [need, self.fingerprint(need)]
                         for need in nodes] for role, nodes in needs.items()}  # a stage may tell several by their names
        made_of = [self.settings.graph[node].stage, spec.version, self.chosen(node), self.observed(node), inputs]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]

    def record(self, node: str) -> dict[str, Any] | None:
        """stage.json of a finished node."""
        return (self.folder / node).read_json(DONE)

    def begun(self, node: str) -> dict[str, Any] | None:
        """begun.json of a node that began, finished or not."""
        return (self.folder / node).read_json(BEGUN)

    def is_done(self, node: str) -> bool:
        record = self.record(node)
        return record is not None and record["fingerprint"] == self.fingerprint(node)

    def is_stale(self, node: str) -> bool:
        """Whether the folder holds results, partial or not, of other settings or inputs, or files that are not ours."""
        begun = self.begun(node)
        if begun is None:
            return not (self.folder / node).is_empty()
        return begun["fingerprint"] != self.fingerprint(node)

    def differences(self, node: str) -> str:
        """Why the results in the node's folder do not match the present settings, in words."""
        begun = self.begun(node) or {}
        if begun.get("fingerprint") == INVALID:
            return "its inputs were recomputed"
        before = begun.get("settings", {}) | begun.get("observed", {})
        now = self.chosen(node) | json.loads(json.dumps(self.observed(node)))
        keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        changes = [f"{key} {before.get(key)} → {now.get(key)}" for key in keys]
        if begun.get("version", 1) != self.spec(node).version:
            changes.append(f"version of the stage {begun.get('version', 1)} → {self.spec(node).version}")
        return ", ".join(changes) or "its inputs changed"

    def check_inputs(self, node: str, made: Collection[str] = ()) -> None:
        """Raise UserError naming the first input that is missing or stale, unless it is among `made`."""
        for need in self.inputs(node):
            if need in made or self.is_done(need):
                continue
            why = f"was made with other settings ({self.differences(need)})" if self.is_stale(need) else "is missing"
            raise UserError(f"{node} needs {need}, which {why} in {self.folder.uri}; "
                            f"run `rayograph {need}` or `rayograph run` with the same settings first")

    def check(self, nodes: list[str], *, redo: bool) -> None:
        """Raise UserError if `nodes` cannot be brought up to date without losing results that must be kept.

        Args:
            nodes: in topological order.
            redo: whether results of other settings may be cleared; those of protected stages need changed=redo.
        """
        anew: set[str] = set()  # nodes that start from scratch: their followers are recomputed
        for node in nodes:
            self.fingerprint(node)  # lists the raw data: a wrong data.root is reported before Ray starts
            follows = bool(anew & set(self.inputs(node)))
            if self.is_done(node) and not follows:
                continue
            self.check_inputs(node, made=nodes)
            protected = self.is_protected(node)
            self.check_stale(node, redo=redo and not protected)
            begun = self.begun(node)
            if begun is not None and follows and protected:
                raise UserError(f"{(self.folder / node).uri} depends on {', '.join(anew & set(self.inputs(node)))}, "
                                "which will be recomputed; add changed=redo to recompute both, or choose another name=")
            if begun is None or self.is_stale(node) or follows:
                anew.add(node)
        for node in anew:
            for follower in self._followers(node):
                if follower not in nodes and self.is_protected(follower) and self.record(follower) is not None:
                    raise UserError(f"{(self.folder / follower).uri} depends on {node}, which will be recomputed; add "
                                    "changed=redo to accept that it becomes out of date, or choose another name=")

    def is_protected(self, node: str) -> bool:
        """Whether the results of a node may not be replaced: its stage is protected and changed=redo was not given."""
        return self.spec(node).protected and self.settings.changed != "redo"

    def check_stale(self, node: str, *, redo: bool) -> None:
        """Raise UserError if the node's folder holds files that may not be replaced."""
        if not self.is_stale(node):
            return
        uri = (self.folder / node).uri
        if self.begun(node) is None:
            raise UserError(f"{uri} contains files that rayograph did not create (it has no {BEGUN}); choose another "
                            "name= or storage=, or move the files")
        if not redo:
            raise UserError(f"{uri} was made with other settings ({self.differences(node)}); add changed=redo to "
                            "replace it, or choose another name=")

    def begin(self, node: str, *, redo: bool) -> None:
        """Prepare the node's folder: resume interrupted work of the same settings, clear results of other settings."""
        folder = self.folder / node
        self.check_stale(node, redo=redo)
        if self.is_stale(node):
            say(f"{node}: {self.differences(node)}; starts from scratch")
            self._invalidate(node)
            folder.clear(BEGUN)
        if self.begun(node) is None or self.is_stale(node):
            for follower in self._followers(node):
                if self.record(follower):
                    say(f"{follower}: out of date, because {node} is recomputed")
                self._invalidate(follower)
        folder.write_json(BEGUN, {
            "fingerprint": self.fingerprint(node), "settings": self.chosen(node), "observed": self.observed(node),
            "version": self.spec(node).version, "seed": self.settings.of(node).seed})

    def _invalidate(self, node: str) -> None:
        """Make the results in a node's folder stale under all settings; the folder stays marked as ours."""
        folder = self.folder / node
        if begun := self.begun(node):
            folder.write_json(BEGUN, begun | {"fingerprint": INVALID})
        folder.remove(DONE)

    def _followers(self, node: str) -> list[str]:
        """All nodes downstream of `node`, whose results become stale when it is recomputed."""
        def needs(other: str) -> bool:
            return any(need == node or needs(need) for need in self.inputs(other))

        return [other for other in self.settings.graph if needs(other)]

    def stage(self, node: str, resources: Resources) -> Stage:
        """The argument of the node's stage function."""
        return Stage(node, self.settings.of(node), self.settings.graph[node].needs, resources, self.fingerprint(node))

    def execute(self, node: str, resources: Resources) -> dict[str, Any]:
        """Run the stage's function and commit its stage.json.  Returns the record."""
        spec, stage = self.spec(node), self.stage(node, resources)
        started = time.time()
        with PeakMemory() as memory:
            metrics = _load(spec.run)(stage)
        metrics |= {"seconds": round(time.time() - started, 2), "peak_rss_mb": memory.peak_mb,
                    "driver_rss_mb": memory.driver_mb}
        record = {
            "stage": self.settings.graph[node].stage,
            "node": node,
            "fingerprint": stage.fingerprint,
            "version": spec.version,
            "settings": self.chosen(node),
            "observed": self.observed(node),
            "inputs": {need: self.fingerprint(need) for need in self.inputs(node)},
            "seed": stage.seed,
            "code": code_version(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "metrics": metrics,
        }
        stage.folder.write_json(DONE, record)
        return record


def _load(path: str) -> Callable[..., Any]:
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
