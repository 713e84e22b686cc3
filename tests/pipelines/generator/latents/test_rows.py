import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import Folder
from pipelines.generator.latents.rows import TrainRows
from pipelines.generator.latents.spec import write_latents, write_spec
from pipelines.tables import parquet


@pytest.fixture
def latents(tmp_path, monkeypatch):
    """Three shards of 40 images in row groups of a few, every third image of val; and the embeddings of train."""
    monkeypatch.setattr(parquet, "ROW_GROUP", 2_000)
    values = np.random.default_rng(0).normal(size=(120, 64)).astype(np.float16)
    split = np.array(["val" if k % 3 == 0 else "train" for k in range(120)])
    for shard in range(3):
        rows = slice(40 * shard, 40 * shard + 40)
        write_latents(Folder(str(tmp_path)), shard, pa.table({
            "image_id": [f"{k}" for k in range(120)][rows], "split": split[rows], "source": ["s"] * 40,
            "latent_mean": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((40, 1, 2, 2), np.float16)),
            "embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(values[rows]),
            "labels": pa.array([[]] * 40, pa.list_(pa.string())),
            "absent": pa.array([[]] * 40, pa.list_(pa.string()))}))
    write_spec(Folder(str(tmp_path)))
    return Folder(str(tmp_path)), values[split == "train"]


def test_every_image_is_found_in_any_order(latents):
    folder, expected = latents
    rows = TrainRows(folder, ["embedding"])
    assert 1 < rows.group_rows < 20, "row groups are small"
    for k in np.random.default_rng(1).permutation(len(expected)):
        assert (rows.row(int(k))["embedding"] == expected[k]).all()


def test_no_more_is_kept_than_there_is_room_for(latents, monkeypatch):
    folder, expected = latents
    rows = TrainRows(folder, ["embedding"], cache_bytes=4_000)
    for k in range(len(expected)):
        rows.row(k)
    kept = rows._group.cache_info()
    assert kept.currsize == kept.maxsize
    assert kept.maxsize * rows.group_rows * 64 * 2 <= 4_000
    before = kept.misses
    rows.row(len(expected) - 1)
    assert rows._group.cache_info().misses == before, "what was just read is not read again"
