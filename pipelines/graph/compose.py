"""From `conf/` and the command line to checked, typed settings."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.errors import UserError
from cluster.storage import absolute
from pipelines.graph import fields
from pipelines.graph.declared import stage_registry
from pipelines.graph.settings import Node, Settings, StageSpec


@functools.cache
def section_types() -> dict[str, type]:
    """The dataclass of every section, by name, imported from its owner."""
    return {name: _named(path) for name, path in stage_registry()["sections"].items()}


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def register_schema() -> None:
    """Register the types and defaults of all settings with Hydra."""
    own: list[Any] = [("profile", str, MISSING), ("storage", str, MISSING), ("name", str, MISSING), ("seed", int, 0),
                      ("changed", str | None, None), ("report", bool, False)]
    sections: list[Any] = [(name, section, dataclasses.field(default_factory=section))
                           for name, section in ((name, fields.schema(kind)) for name, kind in section_types().items())]
    graph: Any = ("graph", dict[str, Any], dataclasses.field(default_factory=dict))
    ConfigStore.instance().store(name="schema", node=dataclasses.make_dataclass("Schema", [*own, *sections, graph]))


def to_settings(config: DictConfig) -> Settings:
    """Check the configuration and freeze it.  Raises UserError naming the key that is wrong or missing."""
    try:
        if missing := OmegaConf.missing_keys(config):
            raise UserError(f"set {', '.join(f'{key}=…' for key in sorted(missing))}: no default is given")
        graph: Any = OmegaConf.to_container(config.graph, resolve=True)
        entries: dict[str, Any] = {name: entry or {} for name, entry in graph.items()}
        settings = _settings(config)
        settings.stages = {name: stage_spec(entry) for name, entry in stage_registry()["stages"].items()}
        settings.graph = {name: _node(name, entry, entries, settings.stages) for name, entry in entries.items()}
        settings.variants = {name: _variant(config, settings, name, entry["with"])
                             for name, entry in entries.items() if entry.get("with")}
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from error
    return settings


def _settings(config: DictConfig) -> Settings:
    """Everything but the graph."""
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    del values["graph"]
    sections = {name: kind(**values.pop(name)) for name, kind in section_types().items()}
    settings = Settings(**values, sections=sections)
    settings.storage = absolute(settings.storage)
    for section in sections.values():
        if hasattr(section, "resolve_paths"):
            section.resolve_paths()
    settings.check()
    return settings


def _variant(config: DictConfig, settings: Settings, node: str, overrides: dict[str, Any]) -> Settings:
    """The settings under a node's overrides, whose keys are `seed` or SECTION.FIELD of its stage; the run stays."""
    stage = settings.graph[node].stage
    sections = settings.stages[stage].settings
    changed = config.copy()
    for key, value in overrides.items():
        section, _, field = key.partition(".")
        fields.require(key == "seed" or (section in sections and bool(field)), f"graph.{node}.with", key,
                       f"must be seed, or SECTION.FIELD of a section of {stage}: {', '.join(sections) or 'none'}")
        OmegaConf.update(changed, key, value)
    for key in ("name", "storage"):  # which may be made of settings that are overridden
        OmegaConf.update(changed, key, getattr(settings, key))
    return _settings(changed)


def stage_spec(entry: dict[str, Any]) -> StageSpec:
    """A stage as `conf/stages.yaml` describes it."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return StageSpec(**values)


def _node(name: str, entry: dict[str, Any], graph: dict[str, Any], stages: dict[str, StageSpec]) -> Node:
    """Raises UserError where the entry names a stage, a role or a node that is not there."""
    if unknown := set(entry) - {"stage", "needs", "with"}:
        raise UserError(f"graph.{name}.{unknown.pop()}: a node has stage, needs and with")
    stage = entry.get("stage", name)
    fields.require(stage in stages, f"graph.{name}.stage", stage, f"must be one of {', '.join(stages)}")
    roles, given = stages[stage].needs, entry.get("needs") or {}
    for role in given:
        fields.require(role in roles, f"graph.{name}.needs", role, f"{stage} needs {', '.join(roles) or 'nothing'}")
    needs = {role: _listed(given.get(role, role)) for role in roles}
    for role, nodes in needs.items():
        for node in nodes:
            fields.require(node in graph, f"graph.{name}.needs.{role}", node,
                           f"must be a node of the graph, one of {', '.join(graph)}")
    return Node(stage, needs)


def _listed(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def load_settings(*overrides: str, **values: Any) -> Settings:
    """Settings as `rayograph` would compose them from these overrides; for tests, notebooks and benchmarks."""
    register_schema()
    with initialize_config_module("pipelines.conf", version_base="1.3"):
        config = compose("config", [*overrides, *(f"{key}={value}" for key, value in values.items())])
    return to_settings(config)
