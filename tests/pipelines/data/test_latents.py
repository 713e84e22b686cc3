import numpy as np
import pyarrow as pa
import pytest

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data.latents import channel_statistics, claim
from pipelines.data.tables import write_shard
from pipelines.stage import Stage


def stage_with_weights(settings) -> Stage:
    stage = Stage("latents", settings, Resources(2, 0, 2), "none")
    stage.input("ingest").write_json("stage.json", {"fingerprint": "images"})
    for network in ("autoencoder", "encoder"):
        (stage.input(network) / "model").write("weights.safetensors", network.encode())
    return stage


def test_latents_belong_to_the_weights_and_the_images_they_were_made_of(tiny):
    stage = stage_with_weights(tiny())
    key = claim(stage)
    assert claim(stage) == key
    (stage.input("encoder") / "model").write("weights.safetensors", b"other")
    with pytest.raises(ValueError, match="latents of other weights"):
        claim(stage)
    stage.folder.clear()
    other = claim(stage)
    (stage.input("encoder") / "model").write("weights.safetensors", b"encoder")
    stage.input("ingest").write_json("stage.json", {"fingerprint": "other images"})
    stage.folder.clear()
    assert len({key, other, claim(stage)}) == 3


def test_channel_statistics_are_those_of_all_latents(tmp_path):
    rng, folder = np.random.default_rng(0), Folder(str(tmp_path))
    parts = [rng.normal([[[1]], [[-3]]], [[[2]], [[5]]], (n, 2, 4, 4)).astype(np.float16) for n in (7, 0, 12)]
    for index, part in enumerate(parts):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(part)) if len(part) else pa.array(
            [], pa.fixed_shape_tensor(pa.float16(), (2, 4, 4)))
        write_shard(folder, index, pa.table({"latent_mean": column}))
    whole = np.concatenate(parts).astype(np.float64)
    assert channel_statistics(folder) == {
        "images": 19, "shape": [2, 4, 4], "channel_mean": whole.mean((0, 2, 3)).round(4).tolist(),
        "channel_std": whole.std((0, 2, 3)).round(4).tolist()}
