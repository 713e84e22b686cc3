"""The argument of a stage function: its folder, its inputs, the settings that it declares, and the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.graph.settings import Settings

Metrics = dict[str, Any]
Section = TypeVar("Section")


@dataclass(frozen=True)
class Stage:
    """One running node of the graph.  Its function does not know whether other nodes run the same stage.

    Args:
        name: of the node, and of its folder.
        settings: with the sections that the stage declares, and no others.
        needs: the nodes that fill each role.
        fingerprint: of the node under these settings and inputs.
    """

    name: str
    settings: Settings
    needs: dict[str, tuple[str, ...]]
    resources: Resources
    fingerprint: str

    @property
    def folder(self) -> Folder:
        return run_folder(self.settings) / self.name

    @property
    def seed(self) -> int:
        return self.settings.seed

    def section(self, kind: type[Section]) -> Section:
        """The settings section of a class, which the stage must declare."""
        found = [section for section in self.settings.sections.values() if type(section) is kind]
        assert found, f"{self.name} does not declare that {kind.__name__} settings shape it"
        return found[0]

    def input(self, role: str) -> Folder:
        """The folder of the one node that fills a role."""
        [folder] = self.inputs(role).values()
        return folder

    def inputs(self, role: str) -> dict[str, Folder]:
        """The folders of all nodes that fill a role, by the nodes' names."""
        assert role in self.needs, f"{self.name} does not declare that it needs {role}"
        return {node: run_folder(self.settings) / node for node in self.needs[role]}

    def record_of(self, role: str) -> dict[str, Any]:
        """stage.json of the one node that fills a role."""
        record = self.input(role).read_json("stage.json")
        assert record is not None, f"{role} has no stage.json"
        return record

    def metrics_of(self, role: str) -> Metrics:
        """The metrics of the one node that fills a role."""
        return self.record_of(role)["metrics"]


def run_folder(settings: Settings) -> Folder:
    """The folder of a run, which holds one folder a node."""
    return Folder(settings.storage) / settings.name
