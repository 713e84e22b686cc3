"""What becomes of a listed file that cannot be read: only what was read and is bad goes to quarantine."""

from __future__ import annotations

import pytest

from cluster import faults
from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.data import convert
from pipelines.data.phantom import render
from pipelines.data.settings import DataSettings
from pipelines.tables.images import encode_png


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """The operator over a folder of three films, and the row of the second."""
    monkeypatch.setattr(faults, "BACKOFF_SECONDS", ())
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(encode_png(render(0, k, 48).image)["bytes"])
    data = DataSettings(source="folder", root=str(tmp_path), size=32)
    row = {"row": 1, "uri": f"{tmp_path}/1.png", "path": "1.png", "source": "folder", "view": None, "masks": []}
    return convert.ConvertShard(Folder(f"{tmp_path}/run"), data), row


def test_a_film_that_can_be_read_is_kept(shard):
    operator, row = shard
    assert "reason" not in operator.one(row)


def test_a_listed_file_that_is_gone_stops_the_run_and_is_not_quarantined(shard, tmp_path):
    operator, row = shard
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png was listed but no longer exists"):
        operator.one(row)


def test_want_of_memory_is_not_held_against_the_film(shard, monkeypatch):
    operator, row = shard

    def large(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("PIL.Image.open", large)
    with pytest.raises(MemoryError):
        operator.one(row)
