"""The pages in docs/ tell of the tables and calls that there are."""

import re
from pathlib import Path

import pytest

from pipelines.tables.schemas import CORPUS, IMAGES, QUARANTINE, latents_schema

DOCS = Path(__file__).parents[1] / "docs"
TABLES = {"ingest/images": IMAGES, "ingest/quarantine": QUARANTINE, "sample/corpus": CORPUS,
          "latents": latents_schema((4, 8, 8), 16, patches=4, structures=["heart"])}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_of_tables_names_every_column_and_no_other(name):
    text = (DOCS / "tables.md").read_text().split(f"## `{name}`")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert {column for cell in cells for column in re.findall(r"`(\w+)`", cell)} == set(TABLES[name].names)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_calls_from_python_run(tmp_path, capsys):
    names = {"storage": str(tmp_path)}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL):
        exec(code, names)  # noqa: S102
    assert names["images"].shape == (8, 1, 32, 32)
    assert "train" in capsys.readouterr().out
