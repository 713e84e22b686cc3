"""Which rows a sample has, and how little of the table is read for it."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import Folder
from pipelines.tables import draw
from pipelines.tables.images import encode_png, images_by_id
from pipelines.tables.parquet import write_shard

SIZES = {"large": 300, "medium": 90, "rare": 3}


def rows() -> list[dict]:
    """Images of three sources one after the other, every third one of the test split; the picture shows the number."""
    sources = [source for source, n in SIZES.items() for _ in range(n)]
    return [{"image_id": f"i{k}", "image": encode_png(np.full((2, 2), k % 256, np.uint8)), "source": source,
             "split": "test" if k % 3 == 0 else "train"} for k, source in enumerate(sources)]


def write(folder: Folder, table: list[dict], shard: int) -> Folder:
    for index in range(0, len(table), shard):
        write_shard(folder, index // shard, pa.Table.from_pylist(table[index : index + shard]))
    return folder


def drawn(folder: Folder, n: int, seed: int = 0, **options) -> list[dict]:
    return draw.draw_rows(folder, n, seed, ["image_id", "source", "split"], **options).to_pylist()


def test_sources_have_their_share_and_a_rare_one_at_least_one_row(tmp_path):
    folder = write(Folder(str(tmp_path)), rows(), 50)
    assert Counter(row["source"] for row in drawn(folder, 40)) == {"large": 30, "medium": 9, "rare": 1}
    assert Counter(row["source"] for row in drawn(folder, 2)) == {"large": 2}


def test_a_sample_is_the_same_however_the_rows_lie_in_shards(tmp_path):
    shuffled = [rows()[k] for k in np.random.default_rng(0).permutation(sum(SIZES.values()))]
    first = drawn(write(Folder(f"{tmp_path}/a"), rows(), 50), 40, split="train")
    second = drawn(write(Folder(f"{tmp_path}/b"), shuffled, 7), 40, split="train")
    assert sorted(row["image_id"] for row in first) == sorted(row["image_id"] for row in second)
    assert {row["split"] for row in first} == {"train"}
    assert len(first) == 40


def test_another_seed_draws_other_rows(tmp_path):
    folder = write(Folder(str(tmp_path)), rows(), 50)
    assert drawn(folder, 40) == drawn(folder, 40)
    assert drawn(folder, 40) != drawn(folder, 40, seed=1)


def test_what_may_not_be_used_is_never_drawn(tmp_path):
    folder = write(Folder(str(tmp_path)), rows(), 50)
    used = np.array([int(row["image_id"][1:]) % 2 == 0 for row in rows() if row["split"] == "train"])
    for n in (40, 10_000):
        found = [int(row["image_id"][1:]) for row in drawn(folder, n, split="train", used=used)]
        assert len(set(found)) == min(n, used.sum())
        assert all(k % 2 == 0 and k % 3 for k in found)
    assert drawn(folder, 40, split="train", used=np.zeros_like(used)) == []


def test_of_a_small_table_every_row_is_drawn_in_order(tmp_path):
    folder = write(Folder(str(tmp_path)), rows(), 50)
    assert [row["image_id"] for row in drawn(folder, 1_000, by=None)] == [row["image_id"] for row in rows()]
    assert drawn(folder, 5, split="val") == []


def test_few_shards_of_many_are_read_whatever_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "SHARDS", 6)
    for name, repeats in (("small", 1), ("large", 10)):
        table = [row | {"image_id": f"{row['image_id']}-{k}"} for row in rows() for k in range(repeats)]
        folder = write(Folder(f"{tmp_path}/{name}"), table, 10)
        found = draw.drawn_rows(folder, 24, 0, None, "source")
        assert len(found) <= 6 + len(SIZES)
        assert sum(map(len, found.values())) == 24
        assert Counter(row["source"] for row in drawn(folder, 24)) == {"large": 18, "medium": 5, "rare": 1}


@pytest.mark.parametrize("ids", [["i3", "i1", "i3"], ["i392"], [f"i{k}" for k in range(100, 0, -1)]])
def test_images_come_in_the_order_of_their_ids(tmp_path, ids):
    folder = write(Folder(str(tmp_path)), rows(), 50)
    assert images_by_id(folder, ids)[:, 0, 0, 0].tolist() == [int(name[1:]) % 256 for name in ids]
