import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import empty

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data.structures import STRUCTURES
from pipelines.generator.latents.dataset import columns_of, draw_val_images
from pipelines.generator.latents.encode import EncodeImages, EncodingSpec, ReadImages, WriteLatents, claim, mask_planes
from pipelines.generator.latents.spec import read_latent_spec, write_latents, write_spec
from pipelines.generator.settings import CONDITIONS
from pipelines.graph.plan import Plan
from pipelines.graph.stage import Stage
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import read_columns, read_tensors, write_shard
from pipelines.tables.schemas import IMAGES, latents_schema


def stage_with_weights(settings) -> Stage:
    stage = Plan(settings).stage("latents", Resources(2, 0, 2))
    stage.input("ingest").write_json("stage.json", {"fingerprint": "images"})
    for network in ("autoencoder", "encoder"):
        (stage.input(network) / "model").write("weights.safetensors", network.encode())
    return stage


def test_latents_belong_to_the_weights_and_the_images_they_were_made_of(tiny):
    stage = stage_with_weights(tiny())
    key = claim(stage)
    assert claim(stage) == key
    (stage.input("encoder") / "model").write("weights.safetensors", b"other")
    with pytest.raises(ValueError, match="other network weights"):
        claim(stage)
    empty(stage.folder)
    other = claim(stage)
    (stage.input("encoder") / "model").write("weights.safetensors", b"encoder")
    stage.input("ingest").write_json("stage.json", {"fingerprint": "other images"})
    empty(stage.folder)
    assert len({key, other, claim(stage)}) == 3


def table(latents: np.ndarray, first: int, splits: list[str], labels: list[list[str]]) -> pa.Table:
    n, (c, h, w) = len(latents), latents.shape[1:]
    columns = {"latent_mean": latents, "embedding": np.zeros((n, 3), np.float16)}
    schema = latents_schema((c, h, w), 3, logvar=False)
    known = {"image_id": [f"id{first + k}" for k in range(n)], "source": ["s"] * n, "patient_id": ["p"] * n,
             "labels": labels, "absent": [[] for _ in labels], "split": splits}
    tensors = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(value) for name, value in columns.items()}
    return pa.table({name: (tensors | known)[name] for name in schema.names}, schema=schema)


def test_the_spec_tells_what_all_files_hold_and_splits_have_files_of_their_own(tmp_path):
    rng, folder = np.random.default_rng(0), Folder(str(tmp_path))
    parts = [rng.normal([[[1]], [[-3]]], [[[2]], [[5]]], (n, 2, 4, 4)).astype(np.float16) for n in (7, 2, 12)]
    splits = [["train"] * 5 + ["val"] * 2, ["test"] * 2, ["train"] * 12]
    labels = [[["b"]] * 5 + [["unseen"]] * 2, [[]] * 2, [["a", "b"]] * 12]
    for index, part in enumerate(parts):
        write_latents(folder, index, table(part, 100 * index, splits[index], labels[index]))
    assert folder.names() == ["test-00001.parquet", "train-00000.parquet", "train-00001.parquet",
                              "train-00002.parquet", "val-00000.parquet"]
    whole = np.concatenate(parts).astype(np.float64)
    assert write_spec(folder) == {
        "images": 21, "shape": [2, 4, 4], "channel_mean": whole.mean((0, 2, 3)).round(4).tolist(),
        "channel_std": whole.std((0, 2, 3)).round(4).tolist(), "logvar": False}
    spec = read_latent_spec(folder)
    assert (spec.latent, spec.shapes, spec.labels, spec.logvar) == ((2, 4, 4), {"embedding": (3,)}, ["a", "b"], False)
    assert spec.images == {"train": 17, "val": 2, "test": 2}
    assert read_columns(folder, ["image_id"], "val")["image_id"].to_pylist() == ["id5", "id6"]
    before = folder.read("train-00000.parquet")
    write_latents(folder, 0, table(parts[0] + 1, 0, splits[0], labels[0]))
    assert folder.read("train-00000.parquet") == before, "the first attempt counts"


def test_validation_opens_no_file_of_train_and_draws_from_every_source(tmp_path):
    folder = Folder(str(tmp_path))
    for index in range(4):
        found = table(np.zeros((30, 1, 2, 2), np.float16), 100 * index, ["train"] * 10 + ["val"] * 20, [["x"]] * 30)
        sources = pa.array(["large" if index < 3 else "small"] * 30)
        write_latents(folder, index, found.set_column(found.schema.get_field_index("source"), "source", sources))
    write_spec(folder)
    for name in folder.names():
        if name.startswith("train-"):
            folder.write(name, b"not to be opened")
    first, again, other = (draw_val_images(folder, read_latent_spec(folder), 16, seed) for seed in (0, 0, 1))
    assert first.image_ids.to_pylist() == again.image_ids.to_pylist() != other.image_ids.to_pylist()
    assert sum(int(one.removeprefix("id")) >= 300 for one in first.image_ids.to_pylist()) == 4


def test_a_mask_becomes_the_share_of_each_structure_at_each_place():
    mask = np.zeros((8, 8), np.uint8)
    mask[:2, :3], mask[4:, 4:] = STRUCTURES["left_lung"], STRUCTURES["right_lung"]
    sides = ("left_lung", "right_lung")
    planes = mask_planes(mask.tobytes(), sides, 8, 4, ["right_lung", "left_lung", "lungs", "heart"])
    assert planes.dtype == np.float16
    assert planes[1, 0].tolist() == [1, 0.5, 0, 0]
    assert planes[0, 2:, 2:].tolist() == [[1, 1], [1, 1]]
    assert (planes[0].sum(), planes[1].sum()) == (4, 1.5)
    assert (planes[2] == planes[0] + planes[1]).all(), "both lungs are known where both sides are"
    assert (planes[3] == -1).all(), "what the set does not outline is unknown, and not empty"
    assert (mask_planes(None, (), 8, 4, ["lungs"]) == -1).all()
    assert (mask_planes(mask.tobytes(), ("left_lung",), 8, 4, ["lungs"]) == -1).all()
    assert (mask_planes(bytes(64), ("pneumothorax",), 8, 4, ["pneumothorax"]) == 0).all(), "stated as not there"
    both = np.full((8, 8), STRUCTURES["lungs"], np.uint8)
    assert mask_planes(both.tobytes(), ("lungs",), 8, 4, ["left_lung", "lungs"]).mean((1, 2)).tolist() == [-1, 1]


@pytest.fixture
def networks(tmp_path):
    """An untrained autoencoder and encoder as their stages leave them."""
    from pipelines.generator.autoencoder.model import new_autoencoder
    from pipelines.generator.settings import AutoencoderSettings
    from pipelines.generator.standalone.image_encoder import Encoder
    from pipelines.learning.weights import save_model

    root = Folder(str(tmp_path))
    save_model(root / "autoencoder", new_autoencoder(AutoencoderSettings(channels=[8, 16, 16]), 32))
    save_model(root / "encoder", Encoder(image_size=32, options={"patch_size": 8, "embed_dim": 16, "depth": 1,
                                                                 "num_heads": 2}))
    return root


def test_patch_features_and_masks_are_kept_where_asked_for(networks):
    from pipelines.generator.settings import LatentsSettings

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = STRUCTURES["heart"]
    blank = dict.fromkeys(IMAGES.names)
    rows = [blank | {"image_id": f"id{k}", "image": encode_png(image), "mask": encode_png(mask) if k else None,
                     "structures": ["heart"] if k else None, "labels": ["Edema"], "absent": ["Mass"],
                     "split": "train"} for k, image in enumerate(images)]
    write_shard(networks / "images", 0, pa.Table.from_pylist(rows, schema=IMAGES))
    settings = LatentsSettings(batch=2, patch_grid=2, masks=["lungs", "heart"])
    encoding = EncodeImages(EncodingSpec(networks / "autoencoder", networks / "encoder", settings, True), 1)
    block = encoding(ReadImages(networks / "images", settings.masks)(pa.table({"shard": [0]})))
    WriteLatents(networks / "latents", settings.masks)(block)
    write_spec(networks / "latents")
    columns = columns_of(read_latent_spec(networks / "latents"), CONDITIONS)
    arrays, table = read_tensors(networks / "latents", columns, ["image_id", "labels", "absent"], "train")
    assert {name: array.shape for name, array in arrays.items()} == {
        "latent_mean": (3, 4, 8, 8), "latent_logvar": (3, 4, 8, 8), "embedding": (3, 16), "patches": (3, 4, 16),
        "mask": (3, 2, 8, 8)}
    assert table["image_id"].to_pylist() == ["id0", "id1", "id2"]
    assert table["labels"].to_pylist() == [["Edema"]] * 3
    assert table["absent"].to_pylist() == [["Mass"]] * 3
    assert read_latent_spec(networks / "latents").structures == ["lungs", "heart"]
    assert (arrays["mask"][0] == -1).all()
    assert (arrays["mask"][1, 0] == -1).all()
    assert (arrays["mask"][1, 1, :4] == 1).all()
    assert np.square(arrays["patches"].astype(np.float32)).mean(-1) == pytest.approx(np.ones((3, 4)), rel=1e-2)
    again = encoding.encoder.embed(torch.from_numpy(images[:, None] / 255).float())
    assert arrays["embedding"] == pytest.approx(again.numpy(), abs=1e-2)
