"""Power-function averages against their closed form, and averages of other lengths from snapshots of two."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.generator.latents import spec as latent_spec
from pipelines.generator.training import average, checkpoint
from pipelines.generator.training.average import DEFAULT_LENGTH, LENGTHS, TrainedModel, choose_length
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.ema import STORED, Ema, average_name, combination, exponent
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.saver import SNAPSHOTS
from pipelines.generator.training.sharded_state import Fragment

STEPS, BATCH = 3_200, 10


@pytest.mark.parametrize("length", [0.01, *LENGTHS, 0.28])
def test_the_profile_has_the_width(length):
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = t ** exponent(length)
    profile /= profile.sum()
    mean = (profile * t).sum()
    assert np.sqrt((profile * (t - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


def test_the_exponents_are_those_of_edm2():
    assert [exponent(length) for length in STORED] == pytest.approx([16.97, 6.94], abs=5e-3)


@pytest.mark.parametrize("power", [1, 2, 5])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_average_of_a_power_of_time_is_its_closed_form(length, power):
    """The mean of s**p weighted with s**x up to t is (x + 1) / (x + 1 + p) t**p."""
    weights = torch.zeros(1, dtype=torch.float64)
    ema = Ema([weights], length)
    for step in range(1, STEPS + 1):
        weights.fill_((step / STEPS) ** power)
        ema.update(BATCH, step * BATCH)
    x = exponent(length)
    assert ema.averages[0].item() == pytest.approx((x + 1) / (x + 1 + power), rel=1e-3)


def walk(seed=0, dims=64):
    """Weights after each step: a random walk, as of training at a constant learning rate."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, dims, generator=generator, dtype=torch.float64).cumsum(0)


def averages(path, lengths):
    """The EMAs (steps, dims) of these lengths after each step of a path."""
    weights = torch.zeros_like(path[0])
    emas, found = [Ema([weights], length) for length in lengths], [[] for _ in lengths]
    for step, now in enumerate(path, 1):
        weights.copy_(now)
        for ema, values in zip(emas, found, strict=True):
            ema.update(BATCH, step * BATCH)
            values.append(ema.averages[0].clone())
    return [torch.stack(values) for values in found]


@pytest.fixture(scope="module")
def averaged():
    """A random walk, and its EMAs by length."""
    path, lengths = walk(), sorted({*STORED, *LENGTHS, 0.06})
    return path, dict(zip(lengths, averages(path, lengths), strict=True))


def reconstructed(averaged, snapshots, length):
    """The relative error of an EMA from so many snapshots, and that of its profile."""
    _, emas = averaged
    steps = [STEPS * k // snapshots for k in range(1, snapshots + 1)]
    rows, error = combination([step * BATCH for step in steps], length)
    found = sum(coefficient * emas[stored][step - 1] for step, row in zip(steps, rows, strict=True)
                for stored, coefficient in zip(STORED, row, strict=True))
    return ((found - emas[length][-1]).norm() / (averaged[0][-1] - emas[length][-1]).norm()).item(), error


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_comes_out_of_16_snapshots_of_two(averaged, length):
    difference, error = reconstructed(averaged, 16, length)
    assert error < 0.04
    assert difference < 0.04


def test_more_snapshots_are_closer(averaged):
    errors = [reconstructed(averaged, snapshots, 0.06) for snapshots in (2, 4, 8, 16)]
    for column in zip(*errors, strict=True):
        assert list(column) == sorted(column, reverse=True)
        assert column[-1] < column[0] / 8


@pytest.mark.parametrize("length", STORED)
def test_a_stored_length_is_the_last_snapshot_itself(length):
    coefficients, error = combination([100, 250, 1_000], length)
    expected = np.zeros((3, 2))
    expected[-1, STORED.index(length)] = 1
    np.testing.assert_allclose(coefficients, expected, atol=1e-9)
    assert error < 1e-6


def save(folder, images, emas):
    """A checkpoint of the EMAs at so many images, of one parameter."""
    [dims] = emas[STORED[0]][0].shape
    layout = Layout([average_name(length) for length in STORED], {"w": [dims]}, [[Fragment("w", 0, 0, dims)]])
    target, step = folder / checkpoint.directory_name(images), images // BATCH
    checkpoint.write_vectors(target, layout, 0, {average_name(w): emas[w][step - 1].float() for w in STORED})
    checkpoint.write_state(target, layout, Cursor(images, step, "f"))


@pytest.fixture
def trained(averaged, tiny, tmp_path):
    """The training of the random walk, with 8 snapshots; the checkpoint is at the end of 7 of these."""
    folder = Folder(str(tmp_path / "train"))
    latents = Folder(str(tmp_path / "latents"))
    latents.write_json(latent_spec.FILE, {
        "latent": [1, 4, 4], "shapes": {"embedding": [2]}, "labels": [], "structures": [], "logvar": False,
        "images": {"train": 8, "val": 8, "test": 8}, "rows": [8]})
    spec = TrainingSpec(tiny("validate.images=8"), "f", folder, latents, None, [0.0], [1.0])
    for k in range(1, 9):
        save(folder / SNAPSHOTS, STEPS * BATCH * k // 8, averaged[1])
    last = STEPS * BATCH * 7 // 8
    save(folder / "checkpoints", last, averaged[1])
    return TrainedModel(spec, folder / "checkpoints" / checkpoint.directory_name(last), Folder(""), Folder(""))


def test_the_snapshots_up_to_the_checkpoint_give_any_width_at_it(averaged, trained):
    step = STEPS * 7 // 8
    [found] = trained.weights(0.06).values()
    expected = averaged[1][0.06][step - 1]
    assert (found - expected).norm() < 0.02 * (averaged[0][step - 1] - expected).norm()


def test_a_snapshot_that_lacks_a_file_is_left_out(averaged, trained):
    damaged = trained.spec.folder / SNAPSHOTS / checkpoint.directory_name(STEPS * BATCH * 6 // 8)
    [file] = [name for name in damaged.names() if name.startswith(average_name(0.1))]
    damaged.remove(file)
    step = STEPS * 7 // 8
    [found] = trained.weights(0.06).values()
    expected = averaged[1][0.06][step - 1]
    assert (found - expected).norm() < 0.1 * (averaged[0][step - 1] - expected).norm()


@pytest.mark.parametrize(("settings", "distances", "expected"), [
    ([], {0.05: 5.0, 0.075: 4.0, 0.1: 3.0, 0.15: 2.0, 0.2: 2.5}, 0.15),
    ([], {0.075: 4.0, 0.15: 3.0, 0.2: 3.5}, 0.15),
    (["validate.images=7"], dict.fromkeys(LENGTHS), DEFAULT_LENGTH),
    ([], {}, DEFAULT_LENGTH),
    (["trainer.ema_length=0.12"], {0.05: 1.0, 0.12: 2.0}, 0.12),
    (["validate.images=0"], {0.05: 1.0}, DEFAULT_LENGTH),
    (["validate.images=0", "trainer.ema_length=0.05"], {}, 0.05),
], ids=["lowest", "some-fail", "few-images", "all-fail", "asked", "none", "asked-none"])
def test_the_length_with_the_lowest_distance_is_exported(trained, tiny, monkeypatch, settings, distances, expected):
    def run_each(resources, function, lengths, max_seconds):
        for length in lengths:
            if length not in distances:
                yield length, ValueError("non-finite features")
            else:
                distance = distances[length]
                yield length, {"val_loss": 0.1} | ({} if distance is None else {"val_frechet": distance})

    monkeypatch.setattr(average, "run_each_on_accelerator", run_each)
    model = replace(trained, spec=replace(trained.spec, settings=tiny("validate.images=8", *settings)))
    length, measured = choose_length(model, Resources(2, 0, 2))
    assert length == expected
    assert measured.keys() <= distances.keys()
    assert ("val_loss" in measured.get(length, {})) == (length in distances and "validate.images=0" not in settings)


def test_a_candidate_that_the_snapshots_do_not_give_is_left_out(trained, monkeypatch):
    """With a lone snapshot, the checkpoint's, only the stored lengths and what is between them."""
    shutil.rmtree((trained.spec.folder / SNAPSHOTS).path)
    sampled = []
    monkeypatch.setattr(average, "run_each_on_accelerator", lambda resources, function, lengths, seconds:
                        sampled.extend(lengths) or iter(()))
    choose_length(trained, Resources(2, 0, 2))
    assert sampled == [0.05, 0.075, 0.1]
