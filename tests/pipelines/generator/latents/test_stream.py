"""Images that Ray Data streams into training: each batch what seed and cursor say, for any number of workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from cluster.storage import Folder
from pipelines.data.phantom import render
from pipelines.generator.autoencoder.model import new_autoencoder
from pipelines.generator.latents.encode import EncodeImages, EncodingSpec, ReadImages
from pipelines.generator.latents.feed import Augment, Feed, StreamPlan
from pipelines.generator.latents.spec import LatentSpec
from pipelines.generator.latents.stream import StreamReader, locate
from pipelines.generator.settings import AutoencoderSettings, LatentsSettings
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.learning.weights import save_model
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import shard_name, write_shard
from pipelines.tables.schemas import IMAGES

SHARDS, ROWS, BATCH = 7, 12, 24
SPEC = LatentSpec((4, 8, 8), {"embedding": (16,)}, ["sick"], [], False, {"train": SHARDS * (ROWS - 2)},
                  (ROWS - 2,) * SHARDS)


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> StreamPlan:
    """Of a small table of images whose shards hold two images of val each, and of untrained networks."""
    root = Folder(str(tmp_path_factory.mktemp("stream")))
    torch.manual_seed(0)
    save_model(root / "autoencoder", new_autoencoder(AutoencoderSettings(channels=[8, 16, 16]), 32))
    save_model(root / "encoder", Encoder(image_size=32, options={"patch_size": 8, "embed_dim": 16, "depth": 1,
                                                                 "num_heads": 2}))
    blank = dict.fromkeys(IMAGES.names)
    for shard in range(SHARDS):
        rows = [blank | {"image_id": f"{shard}-{k}", "image": encode_png(render(0, 100 * shard + k, 32).image),
                         "labels": ["sick"] if k % 2 else [], "absent": [], "split": "val" if k in (3, 7) else "train"}
                for k in range(ROWS)]
        write_shard(root / "images", shard, pa.Table.from_pylist(rows, schema=IMAGES))
    encode = EncodingSpec(root / "autoencoder", root / "encoder", LatentsSettings(batch=8), False)
    return StreamPlan(root / "images", encode, SPEC.rows, 0, 3, False, 1,
                      {"num_cpus": 0.5, "fn_constructor_args": (encode, 1)}, {"cpu": 1.0})


def stream(plan: StreamPlan, cursor: int, total: int, world: int) -> list[np.ndarray]:
    """Embeddings of every global batch, each the shares of all ranks one after another."""
    feed = ray.remote(num_cpus=0)(Feed).remote(plan, cursor, total, world)
    ray.get(feed.start.remote())

    def read(rank: int) -> list[np.ndarray]:
        reader = StreamReader(plan, feed, SPEC, ["embedding"])
        batches = reader.batches(total, BATCH, cursor, rank, world, "cpu")
        return [batch.conditions["embedding"].numpy() for batch in batches]

    with ThreadPoolExecutor(world) as pool:
        shares = list(pool.map(read, range(world)))
    ray.kill(feed)
    return [np.concatenate(parts) for parts in zip(*shares, strict=True)]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_batches_are_a_function_of_seed_and_cursor_for_any_number_of_workers(plan):
    total = 3 * SPEC.images["train"] // BATCH * BATCH  # over two epochs
    expected = {}
    encoding = EncodeImages(plan.encoding, 1)
    for shard in range(SHARDS):
        block = encoding(ReadImages(plan.images, [], "train")(pa.table({"shard": [shard]})))
        embeddings = block["embedding"].combine_chunks().to_numpy_ndarray()
        expected |= dict(zip(block["image_id"].to_pylist(), embeddings, strict=True))
    assert len(expected) == SPEC.images["train"], "images of val are left out"
    reader = StreamReader(plan, None, SPEC, ["embedding"])
    starts = range(0, total, BATCH)
    ids = [reader.ids(start, start + BATCH) for start in starts]
    alone = stream(plan, 0, total, 1)
    for found, names in zip(alone, ids, strict=True):
        np.testing.assert_allclose(found, np.stack([expected[name] for name in names]), atol=2e-3)
    resumed_at = 5 * BATCH
    for found, names in zip(stream(plan, resumed_at, total, 3), ids[5:], strict=True):
        np.testing.assert_allclose(found, np.stack([expected[name] for name in names]), atol=2e-3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_feed_runs_ahead_by_its_windows_only(plan):
    feed = ray.remote(num_cpus=0)(Feed).remote(plan, 0, 10_000, 1)
    ray.get(feed.start.remote())
    window = plan.order().window_at(0)
    ray.get(feed.shard.remote(0, 0, int(window.shards[0])))
    following = plan.order().window_at(window.stop)
    ray.get(feed.shard.remote(0, following.start, int(following.shards[-1])))
    held = ray.get(feed.held.remote())
    assert held <= 2
    ray.kill(feed)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_that_cannot_be_read_ends_the_stream_with_its_reason(plan, tmp_path):
    import shutil
    from dataclasses import replace

    images = Folder(str(tmp_path / "images"))
    shutil.copytree(plan.images.path, images.path)
    images.write(shard_name(2), b"no Parquet")
    broken = replace(plan, images=images)
    with pytest.raises(Exception, match="could not be streamed"):
        stream(broken, 0, SPEC.images["train"], 1)


def test_every_epoch_sees_every_image_once_and_shares_lie_in_few_shards():
    from pipelines.learning.order import WindowedOrder

    order = WindowedOrder((50,) * 40, 3, 8)
    seen = [place for start in range(0, 4000, 400)
            for place in zip(*(found.tolist() for found in locate(order, start, start + 400)), strict=True)]
    assert len(set(seen)) == 4000
    assert {(shard, row) for _, shard, row in seen[:2000]} == {(s, r) for s in range(40) for r in range(50)}
    _, shards, _ = locate(WindowedOrder((50,) * 40, 3, 8), 0, 400)
    assert max(len(set(shards[rank * 50 : rank * 50 + 50])) for rank in range(8)) <= 3


def test_augmentation_is_a_function_of_seed_window_and_shard():
    pixels = [render(0, k, 32).image.tobytes() for k in range(3)]

    def block(window: int) -> pa.Table:
        return pa.table({"pixels": pixels, "side": [32] * 3, "shard": [1] * 3, "window": [window] * 3})

    one, again, other = (Augment(0)(block(window))["pixels"].to_pylist() for window in (0, 0, 84))
    assert one == again != other
    gap = np.abs(np.frombuffer(one[0], np.uint8).astype(int) - np.frombuffer(pixels[0], np.uint8)).mean()
    assert 0 < gap < 40
