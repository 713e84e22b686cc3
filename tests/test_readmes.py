"""What the pages tell a user to type are commands and settings that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipelines.data.own_set import read_set
from pipelines.graph.compose import load_settings
from pipelines.graph.declared import stage_registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/**/README.md"))]


def typed(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return re.findall(r"(?:^|do )rayograph (.*?)(?:; done)?$", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE)


TYPED = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES if ".venv" not in page.parts
                  for line in typed(page)]


def test_every_page_has_been_read():
    assert {page for page, _ in TYPED} >= {"README.md", "pipelines/data/README.md",
                                                    "pipelines/generator/README.md"}


@pytest.fixture(autouse=True)
def _files_of_the_pages(tmp_path, monkeypatch):
    """The YAML files that pages show, by the name in their first line, in the folder where commands are typed."""
    for page in PAGES:
        for name, text in re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", page.read_text(), re.DOTALL):
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["ours.yaml", "archive.yaml"])
def test_the_own_sets_on_the_pages_are_such(name):
    assert read_set(name).key_is == "AccessionNumber"


@pytest.mark.parametrize(("page", "line"), TYPED)
def test_a_command_on_a_page_composes(page, line):
    command, *overrides = shlex.split(line, comments=True)
    assert command in {"run", "$stage", *stage_registry()["stages"]}
    load_settings(*(override for override in overrides if not override.startswith("-")))
