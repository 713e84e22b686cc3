"""conf/stages.yaml: every stage and every section of settings, each declared once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml


@functools.cache
def stage_registry() -> dict[str, Any]:
    """`sections` (name to module:class) and `stages` (name to the fields of a StageSpec)."""
    return yaml.safe_load((Path(__file__).parents[1] / "conf" / "stages.yaml").read_text())
