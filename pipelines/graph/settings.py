"""All settings of a run: a few of its own, the sections of every stage, and the graph of stages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.errors import UserError
from pipelines.graph.fields import check_choices, execution, require


@dataclass(frozen=True)
class StageSpec:
    """A stage, whichever nodes of the graph run it."""

    run: str  # module:function
    help: str = ""
    examples: tuple[str, ...] = ()  # commands
    needs: tuple[str, ...] = ()  # roles of its inputs, each named after the stage that usually fills it
    settings: tuple[str, ...] = ()  # sections that it reads; their fields are part of its fingerprint
    figures: tuple[str, ...] = ()  # format strings of the metrics that summarise it
    version: int = 1  # part of its fingerprint; raised when a code change alters the result for unchanged settings
    observed: str | None = None  # module:function of the settings: external inputs, such as the files listed
    seeded: bool = True  # whether `seed` is part of its fingerprint
    protected: bool = False  # its results are replaced only with changed=redo


@dataclass(frozen=True)
class Node:
    """One use of a stage in the graph, in a folder of its own name."""

    stage: str
    needs: dict[str, tuple[str, ...]]  # the nodes that fill each role


@dataclass
class Settings:
    """Sections are attributes: `settings.data`, `settings.trainer`, …"""

    profile: str
    """Size of everything: demo, small, base, large, or annotated."""
    storage: str
    """Where results are stored: a folder, or s3://, gs://, abfs:// or hdfs:// with a path."""
    name: str
    """Name of the run; its results are in STORAGE/NAME."""
    seed: int = 0
    """Random seed of the whole run."""
    changed: Literal["redo", "refuse"] | None = execution(None)
    """What to do with results that were made with other settings or inputs. redo: delete and recompute them; refuse:
    stop; null: `run` recomputes everything except trained generators, a single stage stops."""
    report: bool = execution(False)
    """`rayograph latents` only: print a quality report on the cached latents."""
    sections: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageSpec] = field(default_factory=dict)
    graph: dict[str, Node] = field(default_factory=dict)
    variants: dict[str, Settings] = field(default_factory=dict)  # of the nodes that have overrides, by name

    def __getattr__(self, name: str) -> Any:
        sections = self.__dict__.get("sections", {})
        if name not in sections:
            raise AttributeError(f"no section {name!r}; there are {', '.join(sections)}")
        return sections[name]

    def of(self, node: str) -> Settings:
        """The settings of one node of the graph: with its overrides, and only the sections that its stage declares."""
        chosen = self.variants.get(node, self)
        declared = self.stages[self.graph[node].stage].settings
        return replace(chosen, sections={name: chosen.sections[name] for name in declared})

    def nodes(self, stage: str) -> list[str]:
        """The nodes of the graph that run a stage."""
        return [name for name, node in self.graph.items() if node.stage == stage]

    def check(self) -> None:
        """Raise UserError naming the first setting that is out of range."""
        require(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name) is not None, "name", self.name,
                "must be letters, digits, '.', '_' and '-' only: it names a folder below storage")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        check_choices("", self)
        refuse_password("storage", self.storage)
        for name, section in self.sections.items():
            check_choices(name, section)
            section.check()
        for section in self.sections.values():
            if hasattr(section, "check_with"):
                section.check_with(self)


def refuse_password(key: str, uri: str) -> None:
    if "://" in uri and urlsplit(uri).password:
        raise UserError(f"{key} holds a password; credentials belong in the environment, not in a setting")
