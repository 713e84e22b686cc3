"""Checks of command-line overrides before Hydra sees them: unknown settings and unknown choices of a group."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster.errors import UserError
from pipelines.graph.compose import section_types
from pipelines.graph.settings import Settings

CONF = Path(__file__).parents[1] / "conf"


def groups() -> dict[str, list[str]]:
    """The config groups that a user chooses from, and the names of their choices."""
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
            for folder in sorted(CONF.iterdir()) if folder.is_dir() and folder.name != "specialize"}


def keys() -> list[str]:
    """All settings, as they are written on the command line."""
    own = [field.name for field in dataclasses.fields(Settings)
           if field.name not in ("sections", "stages", "graph", "variants")]
    return own + [f"{name}.{field.name}" for name, section in section_types().items()
                  for field in dataclasses.fields(section)]


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for the first override of an unknown key or choice, with the closest match."""
    choices, known = groups(), keys()
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if key.startswith("-") or key.startswith("hydra") or not equals:
            continue
        if key in choices:
            if "," not in value and value not in choices[key]:
                raise UserError(f"{key}={value}: unknown; {suggestion(value, choices[key])}")
        elif key.split(".")[0] != "graph" and not any(key == name or key.startswith(f"{name}.") for name in known):
            raise UserError(f"unknown setting {key!r}; {suggestion(key, known, 'rayograph run --help lists them')}")


def suggestion(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The closest match to a word, as a question; without one `otherwise`, or the list of known words."""
    known = list(known)
    if close := difflib.get_close_matches(word, known, 1):
        return f"did you mean {close[0]!r}?"
    return otherwise or f"there are: {', '.join(known)}"
