import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.storage import Folder
from pipelines.data import labels
from pipelines.tables import images
from pipelines.tables import parquet as tables


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "shards"))


def rows(*ids, split="train"):
    return pa.table({"id": pa.array(ids, pa.int64()), "split": pa.array([split] * len(ids), pa.string())})


@pytest.mark.parametrize(("n", "size", "shards"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2)])
def test_shard_count(n, size, shards):
    assert tables.shard_count(n, size) == shards


def test_pending_shards_are_those_not_committed(folder):
    assert tables.pending_shards(folder, 3) == [0, 1, 2]
    tables.write_shard(folder, 1, rows(1))
    tables.write_shard(folder, 2, rows())  # a shard of refused images only is done too
    open(f"{folder.uri}/.{tables.shard_name(0)}.abc.tmp", "wb").close()
    assert tables.pending_shards(folder, 3) == [0]


def test_a_shard_written_twice_is_there_once(folder):
    tables.write_shard(folder, 0, rows(1, 2))
    tables.write_shard(folder, 0, rows(1, 2))
    assert tables.read_columns(folder, ["id"])["id"].to_pylist() == [1, 2]


def test_shards_are_read_in_order_by_column_and_split(folder):
    tables.write_shard(folder, 11, rows(5))
    tables.write_shard(folder, 2, rows(3, 4, split="val"))
    tables.write_shard(folder, 1, rows(1, 2))
    assert tables.read_columns(folder, ["id"])["id"].to_pylist() == [1, 2, 3, 4, 5]
    assert tables.read_columns(folder, ["id"], split="val").to_pydict() == {"id": [3, 4]}
    assert tables.read_columns(folder, ["id"], split="test").to_pydict() == {"id": []}
    assert tables.read_columns(Folder(folder.uri + "-none"), ["id"]).to_pydict() == {"id": []}
    assert [shard["id"].to_pylist() for shard in tables.iterate_shards(folder, ["id"], "val")] == [[], [3, 4], []]


def test_images_and_tensors_of_a_whole_table_are_refused(folder):
    image = images.encode_png(np.zeros((4, 4), np.uint8))
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((1, 2, 2), np.float16))
    tables.write_shard(folder, 0, pa.table({"id": [1], "phash": [b"0" * 32], "labels": [["a"]], "image": [image],
                                            "latent": tensor}))
    assert tables.read_columns(folder, ["id", "labels", "phash"]).num_rows == 1
    for column in ("image", "latent"):
        with pytest.raises(AssertionError, match=column):
            tables.read_columns(folder, ["id", column])


def test_what_is_read_ahead_is_bounded_and_in_order():
    begun = []
    found = tables.read_ahead(lambda k: begun.append(k) or k, range(100), 3)
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert max(begun) <= 7
    assert list(found) == list(range(5, 100))


def test_a_shard_is_plain_parquet(folder):
    tables.write_shard(folder, 3, rows(7))
    assert pq.read_table(f"{folder.uri}/part-00003.parquet").to_pydict() == {"id": [7], "split": ["train"]}


def test_labels_that_are_not_asked_for_are_left_out():
    table = pa.table({"labels": [["b"], ["rare", "a"], []], "absent": [["rare"], ["b"], []]})
    assert labels.label_states(table, ["a", "b"]).tolist() == [[-1, 1], [1, 0], [-1, -1]]
    assert labels.present_findings(table) == ["a", "b", "rare"]


def test_png_and_pixels_are_inverse():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    table = pa.table({"image": [images.encode_png(image) for image in pictures]})
    np.testing.assert_array_equal(images.decode_images(table), pictures[:, None])
    assert images.decode_images(table.slice(0, 0)).shape[0] == 0
    assert Image.open(io.BytesIO(images.encode_png(pictures[0])["bytes"])).mode == "L"


def test_labels():
    kind = pa.list_(pa.string())
    table = pa.table({"labels": pa.array([["b"], [], ["a", "b"], None], kind),
                      "absent": pa.array([["a"], ["b", "c"], [], None], kind)})
    assert labels.present_findings(table) == ["a", "b"], "what is only ever absent is nothing to learn"
    states = labels.label_states(table, ["a", "b"])
    assert states.dtype == np.int8
    assert states.tolist() == [[0, 1], [-1, 0], [1, 1], [-1, -1]]
    assert labels.label_states(table, []).shape == (4, 0)


def test_tensors_come_back_in_shape(folder):
    values = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    tables.write_shard(folder, 0, pa.table({"latent": column}))
    tables.write_shard(folder, 1, pa.table({"latent": column}))
    shards = [tables.tensors(shard, "latent") for shard in tables.iterate_shards(folder, ["latent"])]
    np.testing.assert_array_equal(np.concatenate(shards), np.concatenate([values] * 2))


def test_tensors_of_one_split_come_in_the_order_of_the_shards(folder):
    values = np.random.default_rng(0).standard_normal((30, 2, 3)).astype(np.float16)
    splits = [("train", "val", "train")[k % 3] if k < 20 else "train" for k in range(30)]
    for shard in range(3):
        part = slice(10 * shard, 10 * shard + 10)
        tables.write_shard(folder, shard, pa.table({
            "x": pa.FixedShapeTensorArray.from_numpy_ndarray(values[part]), "split": splits[part],
            "labels": [["a"] if k % 2 else ["a", "b"] for k in range(10)], "absent": [["c"]] * 10}))
    for split in ("train", "val"):
        kept = [k for k, of in enumerate(splits) if of == split]
        arrays, told = tables.read_tensors(folder, ["x"], ["labels", "absent"], split)
        assert np.array_equal(arrays["x"], values[kept])
        assert told["labels"].to_pylist() == [["a"] if k % 2 else ["a", "b"] for k in kept]
        assert labels.present_findings(told) == ["a", "b"]
        assert labels.label_states(told, ["b", "c"]).tolist() == [[-1 if k % 2 else 1, 0] for k in kept]
