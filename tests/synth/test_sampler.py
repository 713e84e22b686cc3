"""Image k of a seed is the same in any batch; a dead actor costs nothing but time."""

from __future__ import annotations

import os
import signal

import numpy as np
import psutil
import pytest
import torch
from conftest import whole

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.generator.autoencoder.model import new_autoencoder
from pipelines.generator.denoiser.network import build_denoiser
from pipelines.generator.denoiser.objective import process
from pipelines.generator.export import assemble, save_pipeline
from pipelines.generator.latents.spec import write_latents, write_spec
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.tables.schemas import latents_schema
from synth import sample as fanout
from synth.conditions import Condition
from synth.sampler import Sampler

WIDTH, LABELS = 32, ["a", "b"]


@pytest.fixture
def spec(tiny, tmp_path):
    """A sampling job on an untrained generator and a handful of embeddings."""
    import pyarrow as pa

    root = Folder(str(tmp_path))
    random = np.random.default_rng(0)
    latents = pa.FixedShapeTensorArray.from_numpy_ndarray(random.normal(size=(10, 4, 8, 8)).astype(np.float16))
    embeddings = pa.FixedShapeTensorArray.from_numpy_ndarray(random.normal(size=(10, WIDTH)).astype(np.float16))
    schema = latents_schema((4, 8, 8), WIDTH, logvar=False)
    columns = {"image_id": [f"id{k}" for k in range(10)], "source": ["s"] * 10, "latent_mean": latents,
               "embedding": embeddings, "patient_id": ["p"] * 10, "labels": [[LABELS[k % 2]] for k in range(10)],
               "absent": [[LABELS[1 - k % 2]] for k in range(10)], "split": ["train"] * 10}
    write_latents(root / "latents", 0, pa.table([columns[name] for name in schema.names], schema=schema))
    write_spec(root / "latents")

    def make(name: str, *overrides: str) -> fanout.SamplingSpec:
        settings = tiny(*overrides)
        torch.manual_seed(0)
        denoiser = build_denoiser(settings.denoiser, settings.condition, (4, 8, 8), {"embedding": (WIDTH,)}, LABELS)
        save_pipeline(tmp_path / f"{name}-generator", assemble(
            vae=new_autoencoder(settings.autoencoder, 32), denoiser=denoiser,
            scheduler=process(settings.objective, "cpu").scheduler(),
            encoder=Encoder(image_size=32, options=settings.encoder.options), num_inference_steps=4,
            guidance_scale=2.0))
        return fanout.SamplingSpec(settings.sample, 7, root / f"{name}-generator", "revision", root / "latents",
                                   root / name)

    return make


def test_image_k_does_not_depend_on_the_batch_it_is_sampled_in(spec):
    sampler = Sampler(spec("corpus").generator, steps=4, guidance=2.0, batch=4)
    random = np.random.default_rng(0)
    conditions = [Condition({"embedding": random.normal(size=WIDTH).astype(np.float32),
                             "labels": np.eye(2, dtype=np.float32)[k % 2]}, ()) for k in range(6)]
    together = sampler.sample(conditions, 0, range(6))
    assert together.dtype == np.uint8
    assert together.shape == (6, 32, 32)
    for k in (0, 3, 5):
        assert (sampler.sample([conditions[k]], 0, [k])[0] == together[k]).all()
    assert not (sampler.sample(conditions[:1], 1, [0])[0] == together[0]).all()


@pytest.mark.ray
def test_the_corpus_is_the_same_for_any_number_of_actors_and_when_one_is_killed(spec, ray_cluster):
    one, many = spec("one", "sample.actors=1"), spec("many", "sample.actors=2")
    shards = list(range(3))
    list(fanout.fan_out(one, shards, Resources(2, 0, 2)))
    events = fanout.fan_out(many, shards, Resources(4, 0, 4))
    assert next(events) is None
    victims = [p for p in psutil.Process().children(recursive=True)
               if "ray::SamplingActor" in " ".join(p.cmdline()[:1])]
    os.kill(victims[0].pid, signal.SIGKILL)
    assert sum(events) == 48
    first, second = (whole(folder).to_pylist() for folder in (one.corpus, many.corpus))
    assert first == second
    assert len({row["image_id"] for row in first}) == 48
    for row in first:
        sick = int(row["source_image_ids"][0][2:]) % 2
        assert (row["labels"], row["absent"]) == ([LABELS[sick]], [LABELS[1 - sick]])


@pytest.mark.ray
def test_images_of_a_generator_without_conditions_have_no_labels_and_no_sources(spec, ray_cluster):
    free = spec("free", "condition.embedding_tokens=0", "condition.labels=false")
    list(fanout.fan_out(free, [0], Resources(2, 0, 2)))
    rows = whole(free.corpus).to_pylist()
    assert len(rows) == 16
    assert not any(row["labels"] or row["absent"] or row["source_image_ids"] for row in rows)
