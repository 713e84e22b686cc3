"""What a reader hands out, from where, and how much of it is in memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import Folder
from pipelines.learning import readers
from pipelines.learning.order import Order
from pipelines.learning.readers import ArrayReader, ImageReader
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import shard_name, write_shard
from pipelines.tables.schemas import IMAGE

SIDE = 4


def write(folder: Folder, first: int, sizes: list[int]) -> Folder:
    """Shards of images of the train split that show their number, one of the val split among them."""
    for index, size in enumerate(sizes):
        numbers = [*range(first, first + size)]
        splits = ["train"] * size
        if size:
            numbers.insert(1, 255)
            splits.insert(1, "val")
        images = pa.array([encode_png(np.full((SIDE, SIDE), number, np.uint8)) for number in numbers], IMAGE)
        write_shard(folder, index, pa.table({"image": images, "split": pa.array(splits, pa.string())}))
        first += size
    return folder


@pytest.fixture
def parts(tmp_path):
    """Two tables: images 0 to 59, and 60 to 99."""
    return [(write(Folder(f"{tmp_path}/real"), 0, [9, 12, 0, 20, 19]), "train"),
            (write(Folder(f"{tmp_path}/made"), 60, [30, 10]), "train")]


def shown(batches) -> list[int]:
    return [int(value) for batch in batches for value in batch.inputs[:, 0, 0, 0]]


@pytest.fixture(params=["one window", "windows"])
def budget(request, monkeypatch):
    if request.param == "windows":  # of one shard of 30 images
        monkeypatch.setattr(readers, "DECODED_BYTES", 2 * 30 * SIDE**2)


def test_every_epoch_shows_every_image_once_with_its_target(parts, budget):
    reader = ImageReader(parts, 3, np.arange(100))
    assert reader.n == 100
    batches = list(reader.batches(300, 16))
    assert [(batch.start, batch.stop) for batch in batches[-2:]] == [(272, 288), (288, 300)]
    for batch in batches:
        np.testing.assert_array_equal(batch.inputs[:, 0, 0, 0], batch.targets)
        assert batch.inputs.strides == (SIDE**2, 1, SIDE, 1)  # convolutions choose their kernels, and so digits, by it
    for epoch in range(3):
        assert sorted(shown(batches)[100 * epoch : 100 * (epoch + 1)]) == list(range(100))


@pytest.mark.parametrize("cursor", [0, 16, 48, 96, 208, 299])
def test_a_resumed_reader_hands_out_what_an_unbroken_one_does(parts, budget, cursor):
    whole = shown(ImageReader(parts, 3).batches(300, 16))
    assert shown(ImageReader(parts, 3).batches(300, 16, cursor)) == whole[cursor:]


def test_a_small_set_comes_in_the_order_of_a_set_in_memory_and_is_decoded_once(parts, monkeypatch):
    decoded = []
    picture = readers.decode_image
    monkeypatch.setattr(readers, "decode_image", lambda image: decoded.append(1) or picture(image))
    assert shown(ImageReader(parts, 5).batches(250, 32)) == Order(100, 5).indices(0, 250).tolist()
    assert len(decoded) == 101  # one to learn their size from
    array = np.arange(100).repeat(SIDE**2).reshape(100, 1, SIDE, SIDE)
    assert shown(ArrayReader(array, None, 5).batches(250, 32)) == Order(100, 5).indices(0, 250).tolist()


def test_a_damaged_shard_ends_the_training(parts, budget):
    reader = ImageReader(parts, 3)
    write_shard(parts[0][0], 4, pa.table({"image": [{"bytes": b"no image", "path": None}] * 19,
                                         "split": ["train"] * 19}))
    with pytest.raises(OSError, match="cannot identify"):
        list(reader.batches(100, 16))


PEAK = """
import resource, sys
from cluster.storage import Folder
from pipelines.learning import readers
readers.DECODED_BYTES = 4 << 20
reader = readers.ImageReader([(Folder(sys.argv[1]), "train")], 0)
for batch in reader.batches(reader.n, 32):
    pass
print(reader.n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 64), np.uint8)
    one = Folder(f"{tmp_path}/one")
    write_shard(one, 0, pa.table({"image": [encode_png(image) for image in noise], "split": ["train"] * len(noise)}))
    peaks = {}
    for shards in (64, 512):  # 8 and 64 MiB of decoded images, and as much of encoded ones
        folder = tmp_path / str(shards)
        folder.mkdir()
        for index in range(shards):
            os.link(f"{one.path}/{shard_name(0)}", folder / shard_name(index))
        out = subprocess.run([sys.executable, "-c", PEAK, str(folder)], check=True, capture_output=True, text=True)
        images, peaks[shards] = map(int, out.stdout.split())
        assert images == 32 * shards
    assert peaks[512] < 1.1 * peaks[64], peaks
