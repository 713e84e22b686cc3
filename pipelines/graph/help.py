"""Help of a stage, and docs/settings.md, from the settings' own sentences."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any

from omegaconf import MISSING, OmegaConf

from cluster.errors import UserError
from pipelines.graph.compose import section_types, stage_spec
from pipelines.graph.declared import stage_registry
from pipelines.graph.fields import descriptions
from pipelines.graph.overrides import groups
from pipelines.graph.settings import Settings

WIDTH = 100
PREFACE = """Made by `make docs` from the settings' own sentences; profiles and config groups change defaults. Those
marked • say how a stage is run and not what it makes: changing one redoes nothing."""


def stage_help(command: str, config: Any) -> str:
    """What `rayograph STAGE --help` prints: purpose, examples, and the stage's own settings with their present values.

    Args:
        command: a stage or a node of the graph, or `run` for all settings.
        config: as composed from the other arguments.
    """
    if command == "run":
        purpose, sections = "the whole path, each stage only where its work is not yet done", tuple(section_types())
        examples: tuple[str, ...] = ()
    else:
        stages = stage_registry()["stages"]
        if command not in {*stages, *config.graph}:
            raise UserError(f"the graph has no node {command!r}; it has {', '.join(config.graph)}")
        spec = stage_spec(stages[(config.graph.get(command) or {}).get("stage", command)])
        purpose, sections, examples = spec.help, spec.settings, spec.examples
    lines = [f"rayograph {command}: {purpose}", "", *(f"  {example}" for example in examples), "" if examples else None]
    lines += [f"{group}=…".ljust(12) + _wrapped(", ".join(choices), 12) for group, choices in groups().items()]
    own = descriptions(Settings)
    lines += ["", *(_line(name, config[name], own[name]) for name in own)]
    for name in sections:
        kind, values = section_types()[name], OmegaConf.to_container(config[name])
        assert isinstance(values, dict)
        sentences = descriptions(kind)
        lines += ["", f"{name}: {inspect.getdoc(kind)}",
                  *(_line(f"{name}.{field.name}", values[field.name], sentences[field.name])
                    for field in dataclasses.fields(kind))]
    return "\n".join(line for line in lines if line is not None)


def _line(key: str, value: Any, sentence: str) -> str:
    shown = f"  {key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
    first = shown.ljust(40) if len(shown) < 40 else f"{shown}\n{' ' * 40}"
    return first + _wrapped(sentence, 40)


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, max(WIDTH - indent, 40)).replace("\n", "\n" + " " * indent)


def settings_page() -> str:
    """docs/settings.md: all settings with their types, defaults and sentences."""
    lines = ["# Settings", "", PREFACE, "", "| setting | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {sentence} |" for name, sentence in descriptions(Settings).items()]
    for name, kind in section_types().items():
        sentences = descriptions(kind)
        lines += ["", f"## {name}", "", str(inspect.getdoc(kind)), "", "| setting | type | default | meaning |",
                  "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            default = field.default_factory() if callable(field.default_factory) else field.default
            mark = " •" if field.metadata.get("execution") else ""
            if default is None or default == MISSING:
                default = "by profile" if default else "null"
            kind_of_value = str(field.type).replace("|", "\\|")
            lines.append(f"| `{name}.{field.name}`{mark} | {kind_of_value} | `{default}` | {sentences[field.name]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(settings_page(), end="")
