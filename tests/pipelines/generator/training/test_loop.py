"""The training loop without Ray: exact order and exact resumption, whoever is killed; and what a bad batch does."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import UNet2DConditionModel
from distributed import run, start

from cluster.storage import Folder
from pipelines.generator.denoiser.pretrained import published_config
from pipelines.generator.latents.spec import write_latents, write_spec
from pipelines.generator.training import checkpoint
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.stage import write_start
from pipelines.monitor.journal import read_journal
from pipelines.tables.schemas import latents_schema

pytestmark = pytest.mark.ray

IMAGES, BATCH, STEPS, LATENT, WIDTH = 60, 12, 100, (4, 8, 8), 8


def make_table(folder, poisoned=()):
    random = np.random.default_rng(0)
    mean = random.normal(size=(IMAGES, *LATENT)).astype(np.float16)
    mean[list(poisoned)] = math.inf
    tensors = {"latent_mean": mean, "latent_logvar": np.full_like(mean, -8)} | {
        name: random.normal(size=(IMAGES, *shape)).astype(np.float16)
        for name, shape in {"embedding": (WIDTH,), "patches": (4, WIDTH), "mask": (2, *LATENT[1:])}.items()}
    columns = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(value) for name, value in tensors.items()}
    metadata = {"image_id": [f"image-{k}" for k in range(IMAGES)], "patient_id": ["p"] * IMAGES,
                "labels": [["sick"] if k % 3 else [] for k in range(IMAGES)],
                "absent": [[] if k % 3 else ["sick"] for k in range(IMAGES)], "split": ["train"] * IMAGES,
                "source": ["s"] * IMAGES}
    schema, latents = latents_schema(LATENT, WIDTH, 4, ["lungs", "heart"]), Folder(str(folder / "latents"))
    write_latents(latents, 0, pa.table({name: (columns | metadata)[name] for name in schema.names}, schema=schema))
    write_spec(latents)


def train_in(rank, world, folder, name, steps, options=(), published=None, is_preempted=lambda: False):
    """Train in `folder`/`name` from its newest checkpoint on; every worker writes down the images it was given."""
    from conftest import TINY

    from pipelines.generator.latents.dataset import CachedReader
    from pipelines.generator.latents.spec import read_latent_spec
    from pipelines.generator.training.loop import TrainingSpec, run_training_loop
    from pipelines.graph.compose import load_settings

    settings = load_settings(*TINY, f"trainer.images={steps * BATCH}", f"trainer.batch={BATCH}", "name=run",
                             f"trainer.workers={world}", f"trainer.log_every={5 * BATCH}", "trainer.zero_stage=2",
                             f"trainer.checkpoint_every={10 * BATCH}", "trainer.precision=fp32", *options)
    out = Folder(str(folder / name))
    spec = TrainingSpec(settings, "a fingerprint", out, Folder(str(folder / "latents")), None, [0.0] * 4, [1.0] * 4,
                        published)

    class RecordingReader(CachedReader):
        def batches(self, *arguments):
            for batch in super().batches(*arguments):
                b = len(batch)
                ids = self.ids(batch.start, batch.stop)[rank * b // world : (rank + 1) * b // world]
                with open(folder / f"{name}-seen-{rank}.jsonl", "a") as file:
                    file.write(json.dumps({"start": batch.start, "image_ids": ids}) + "\n")
                yield batch

    def save(engine, cursor, since):
        target, layout = out / "checkpoints" / checkpoint.directory_name(cursor.images), engine.layout()
        checkpoint.write_vectors(target, layout, rank, engine.snapshot())
        if rank == 0:
            checkpoint.write_state(target, layout, cursor)

    latent_spec = read_latent_spec(spec.latents)
    reader = RecordingReader(spec.latents, latent_spec, settings.seed, settings.condition.used)
    return run_training_loop(spec, latent_spec, reader, rank, world, checkpoint.latest_complete(out / "checkpoints"),
                             save, is_preempted)


def state_at(folder, images):
    """The whole state of a checkpoint, by part."""
    saved = Folder(str(folder / "checkpoints" / checkpoint.directory_name(images)))
    return {part: checkpoint.read_part(saved, part) for part in checkpoint.read_layout(saved).parts}


def seen(folder, name, world):
    """The images of every step: the last attempt's, where a step was taken twice."""
    steps = {}
    for rank in range(world):
        for line in (folder / f"{name}-seen-{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            steps[entry["start"], rank] = entry["image_ids"]
    return steps


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder of a training by one worker that nothing broke off."""
    folder = tmp_path_factory.mktemp("unbroken")
    make_table(folder)
    run(1, train_in, folder, "unbroken", STEPS, ["trainer.profile_steps=2"])
    return folder


KINDS = {
    "unconditional": ["condition.embedding_tokens=0", "condition.labels=false"],
    "labels": ["condition.embedding_tokens=0"],
    "patches-mask": ["condition.patches=true", "latents.patch_grid=2", "condition.mask=true",
                     "latents.masks=[lungs,heart]"],
    "dit": ["denoiser.architecture=dit", "denoiser.width=32", "denoiser.layers=2"],
    "edm": ["objective.process=edm"],
    "flow": ["objective.process=flow", "objective.loss=huber"],
    "checkpointing": ["trainer.activation_checkpointing=true", "trainer.channels_last=false", "trainer.micro_batch=5"],
    "constant": ["trainer.schedule=constant", "objective.loss=l1"],
}


def learn_each(rank, world, folder):
    """Names of the parameters that no step moved, by kind of generator.

    But for those of the queries where there is a lone token, which does not depend on them.
    """
    from conftest import TINY

    from pipelines.generator.latents.spec import read_latent_spec
    from pipelines.generator.training.loop import TrainingSpec
    from pipelines.graph.compose import load_settings

    still = {}
    for kind, options in KINDS.items():
        assert train_in(rank, world, folder, kind, 10, [*options, "trainer.warmup_images=0"]) is None
        spec = TrainingSpec(load_settings(*TINY, *options), "", Folder(""), Folder(str(folder / "latents")), None,
                            [0.0] * 4, [1.0] * 4)
        fresh = spec.denoiser(read_latent_spec(spec.latents)).state_dict()
        learnt = state_at(folder / kind, 10 * BATCH)
        still[kind] = [name for name, value in learnt["model"].items() if torch.equal(value, fresh[name])
                       and not (kind in ("unconditional", "labels") and name.endswith("0.norm2.weight"))]
    return still


def test_every_parameter_of_every_kind_of_generator_learns(tmp_path):
    make_table(tmp_path)
    [still] = run(1, learn_each, tmp_path)
    assert still == {kind: [] for kind in KINDS}
    for kind in KINDS:
        last = read_journal(Folder(str(tmp_path / kind)))[-1]
        assert (last["images"], last["skipped"]) == (10 * BATCH, 0)
        assert 0 < last["loss"] < 2


def test_a_window_of_steps_is_traced(unbroken):
    trace = json.loads((unbroken / "unbroken" / "profile" / "trace.json").read_text())
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in trace["traceEvents"]) >= 2


def held_out(rank, world, folder):
    """Loss at fixed noise of the weights before training and after it; the second measured twice."""
    from conftest import TINY

    from pipelines.generator.latents.dataset import CachedReader
    from pipelines.generator.latents.spec import read_latent_spec
    from pipelines.generator.settings import CONDITIONS
    from pipelines.generator.training.loop import TrainingSpec
    from pipelines.generator.training.validate import held_out_losses
    from pipelines.graph.compose import load_settings

    spec = TrainingSpec(load_settings(*TINY), "", Folder(""), Folder(str(folder / "latents")),
                        None, [0.0] * 4, [1.0] * 4)
    latent_spec = read_latent_spec(spec.latents)
    reader, denoiser = CachedReader(spec.latents, latent_spec, 0, CONDITIONS).encoded, spec.denoiser(latent_spec).eval()
    reader.image_ids = reader.image_ids[:40]
    losses = [held_out_losses(spec, denoiser, reader)[0]]
    last = state_at(folder / "unbroken", STEPS * BATCH)
    denoiser.load_state_dict(last["model"])
    return [loss.numpy() for loss in [*losses, *(held_out_losses(spec, denoiser, reader)[0] for _ in range(2))]]


def test_the_loss_at_fixed_noise_repeats_and_falls_with_training(unbroken):
    [(before, after, again)] = run(1, held_out, unbroken)
    assert len(before) == 40
    np.testing.assert_array_equal(after, again)
    fall = before - after
    assert fall.mean() > 5 * fall.std() / len(fall) ** 0.5
    assert after.mean() < 0.9  # of untrained networks: 0.97, and 1.02 without adaptive_norm


@pytest.mark.parametrize("world", [1, 2])
def test_a_hundred_steps_are_fifty_a_kill_and_fifty(unbroken, tmp_path, world):
    make_table(tmp_path)
    children, _results = start(world, train_in, tmp_path, "broken", STEPS)
    half = tmp_path / "broken" / "checkpoints" / checkpoint.directory_name(50 * BATCH)
    deadline = time.monotonic() + 200
    while not (half / checkpoint.STATE).exists():
        assert time.monotonic() < deadline
        assert all(child.is_alive() for child in children), "training was over before it could be killed"
        time.sleep(0.002)
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    run(world, train_in, tmp_path, "broken", STEPS)

    found, expected = seen(tmp_path, "broken", world), seen(unbroken, "unbroken", 1)
    assert {begin: [*images, *found.get((begin, 1), [])] for (begin, rank), images in found.items() if rank == 0} \
        == {begin: images for (begin, _), images in expected.items()}
    counts = Counter(image for images in found.values() for image in images)
    assert counts == {f"image-{k}": STEPS * BATCH // IMAGES for k in range(IMAGES)}
    two_epochs = Counter(image for (begin, _), images in found.items() if begin < 2 * IMAGES for image in images)
    assert set(two_epochs.values()) == {2}
    assert len(two_epochs) == IMAGES
    one, other = read_journal(Folder(str(unbroken / "unbroken"))), read_journal(Folder(str(tmp_path / "broken")))
    assert [entry["images"] for entry in one] == [entry["images"] for entry in other]
    assert [entry["loss"] for entry in one] == pytest.approx([entry["loss"] for entry in other], rel=1e-4)
    first, second = (state_at(folder, STEPS * BATCH) for folder in (unbroken / "unbroken", tmp_path / "broken"))
    for part, tensors in first.items():
        one, other = (torch.cat([side[part][key].flatten() for key in tensors]) for side in (first, second))
        gap = (one - other).norm() / one.norm()
        assert gap <= (0 if world == 1 else 0.05), part  # to the last bit, where nothing is added up in another order


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoints_have_a_least_interval_in_seconds(tmp_path, world):
    make_table(tmp_path)
    run(world, train_in, tmp_path, "quick", 40, ["trainer.checkpoint_seconds=3600"])
    assert [path.name for path in (tmp_path / "quick" / "checkpoints").iterdir()] == [
        checkpoint.directory_name(40 * BATCH)]


def test_training_starts_from_published_weights_and_goes_on_without_them(tmp_path, tiny):
    make_table(tmp_path)
    torch.manual_seed(1)
    published = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, cross_attention_dim=32)
    published.save_pretrained(tmp_path / "unet")
    options, config = [f"denoiser.pretrained={tmp_path}", "trainer.lr=1e-9"], published_config(str(tmp_path))
    write_start(TrainingSpec(tiny(*options), "a fingerprint", Folder(str(tmp_path / "fitted")),
                             Folder(str(tmp_path / "latents")), None, [0.0] * 4, [1.0] * 4, config))
    shutil.rmtree(tmp_path / "unet")
    for steps in (1, 2):
        run(2, train_in, tmp_path, "fitted", steps, options, config)
        learnt = state_at(tmp_path / "fitted", steps * BATCH)["model"]
        for name, value in published.state_dict().items():
            torch.testing.assert_close(learnt[f"network.{name}"], value, atol=1e-7, rtol=0)


def test_poisoned_batches_are_skipped_counted_and_end_the_training_with_their_ids(tmp_path):
    make_table(tmp_path, poisoned=[7])
    first, again, left = run(1, three_times, tmp_path)[0]
    assert first is None
    lines = [json.loads(line) for line in (tmp_path / "some" / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 2  # once in each of two epochs
    assert all("image-7" in line["image_ids"] and len(line["image_ids"]) == BATCH for line in lines)
    entries = read_journal(Folder(str(tmp_path / "some")))
    assert entries[-1]["skipped"] == 2
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    state = state_at(tmp_path / "some", 2 * IMAGES)
    cursor = checkpoint.read_cursor(Folder(str(tmp_path / "some/checkpoints" / checkpoint.directory_name(2 * IMAGES))))
    assert cursor.steps == 2 * IMAGES // BATCH - 2
    assert all(value.isfinite().all() for tensors in state.values() for value in tensors.values())
    assert "in 1 batches" in again
    assert "skipped.jsonl" in again
    assert left == [5, 10]


def three_times(rank, world, folder):
    """Why training stops where two bad batches are allowed, and where none is; and, in the same process, at which steps
    a checkpoint is written where the node is to be taken away."""
    some = train_in(rank, world, folder, "some", 10, ["trainer.max_skipped_batches=2"])
    none = train_in(rank, world, folder, "none", 10, ["trainer.max_skipped_batches=0"])
    train_in(rank, world, folder, "left", 10, is_preempted=lambda: True)
    written = checkpoint.list_checkpoints(Folder(str(folder / "left" / "checkpoints")))
    return some, none, [checkpoint.images_seen(one) // BATCH for one in written]


def read_shared(rank, world, folder):
    """The table as this worker has it, and what of it lies in files of the cache."""
    from pipelines.generator.latents.dataset import CachedReader
    from pipelines.generator.latents.spec import read_latent_spec

    latents = Folder(str(folder / "latents"))
    read = CachedReader(latents, read_latent_spec(latents), 0, ["embedding"], folder / "node" / "cache").encoded
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "node/cache" in line]
    return read.mean[:], read.conditions["embedding"][:], read.conditions["labels"], len(mapped)


def test_the_workers_of_a_node_hold_the_latents_once_and_the_next_ones_find_them(tmp_path):
    make_table(tmp_path)
    both = run(2, read_shared, tmp_path)
    for other in ("latents/train-00000.parquet",):  # what is read from here on is the node's
        (tmp_path / other).unlink()
    [again] = run(1, read_shared, tmp_path)
    for shared in (*both, again):
        assert shared[-1] == 3  # means, log-variances, embeddings
        for one, other in zip(both[0][:-1], shared[:-1], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_cache_that_was_cut_off_is_read_anew(tmp_path):
    make_table(tmp_path)
    cache = tmp_path / "node" / "cache"
    cache.mkdir(parents=True)
    (cache / "latent_mean.npy").write_bytes(b"half")
    [found] = run(1, read_shared, tmp_path)
    assert found[0].shape == (IMAGES, *LATENT)
