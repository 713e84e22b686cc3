"""What is measured of a checkpoint does not depend on what else is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.storage import Folder
from pipelines.generator.autoencoder.model import new_autoencoder
from pipelines.generator.latents.spec import read_latent_spec, write_latents, write_spec
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.generator.training import checkpoint
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.ema import STORED, average_name
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.sharded_state import fragments
from pipelines.generator.training.validate import drawn, validate
from pipelines.tables.schemas import latents_schema

LATENT, WIDTH = (4, 8, 8), 32
SOURCES = ["first"] * 30 + ["second"] * 10  # of the val images, in the order of the table


@pytest.fixture
def spec(tiny, tmp_path):
    random = np.random.default_rng(0)
    tensors = {"latent_mean": (len(SOURCES), *LATENT), "embedding": (len(SOURCES), WIDTH)}
    columns = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(random.normal(size=shape).astype(np.float16))
               for name, shape in tensors.items()}
    columns |= {"image_id": [f"image-{k}" for k in range(len(SOURCES))], "patient_id": ["p"] * len(SOURCES),
                "labels": [[]] * len(SOURCES), "absent": [[]] * len(SOURCES), "split": ["val"] * len(SOURCES),
                "source": SOURCES}
    schema, latents = latents_schema(LATENT, WIDTH, logvar=False), Folder(str(tmp_path / "latents"))
    write_latents(latents, 0, pa.table({name: columns[name] for name in schema.names}, schema=schema))
    write_spec(latents)
    settings = tiny("validate.images=20", "validate.frechet_images=36", "validate.steps=2", "validate.sample_images=4")
    spec = TrainingSpec(settings, "f", Folder(str(tmp_path / "train")), latents, None, [0.0] * 4, [1.0] * 4)
    named = list(spec.denoiser(read_latent_spec(latents)).named_parameters())
    weights = [parameter.detach() for _, parameter in named]
    part, folder = average_name(STORED[0]), spec.folder / "checkpoints" / checkpoint.directory_name(8)
    layout = Layout([part], {name: list(weight.shape) for name, weight in named}, [fragments(0, 0, named, weights)])
    checkpoint.write_vectors(folder, layout, 0, {part: torch.cat([weight.flatten() for weight in weights])})
    checkpoint.write_state(folder, layout, Cursor(8, 1, "f"))
    new_autoencoder(settings.autoencoder, 32).save_pretrained(tmp_path / "autoencoder" / "model")
    Encoder(image_size=32, options=settings.encoder.options).save_pretrained(tmp_path / "encoder" / "model")
    return spec


def test_the_held_out_loss_is_of_the_same_images_whether_the_distance_is_measured_or_not(spec, tmp_path):
    autoencoder, encoder = Folder(str(tmp_path / "autoencoder")), Folder(str(tmp_path / "encoder"))
    folder = spec.folder / "checkpoints" / checkpoint.directory_name(8)
    plain, both = (validate(spec, autoencoder, encoder, folder, frechet) for frechet in (False, True))
    assert both.pop("val_frechet") > 0
    assert both == plain


def test_every_source_has_its_part_of_what_is_measured(spec):
    for images in (4, 20, 36):
        ids = drawn(spec, read_latent_spec(spec.latents), images).image_ids.to_pylist()
        assert sum(int(name.removeprefix("image-")) < 30 for name in ids) == images * 3 // 4
