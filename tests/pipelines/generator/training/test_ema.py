"""Power-function averages against their closed form, and averages of other widths from snapshots of two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.generator.training import average, checkpoint
from pipelines.generator.training.average import DEFAULT_WIDTH, WIDTHS, TrainedModel, choose_width
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.ema import STORED, Ema, average_name, combination, exponent
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.saver import SNAPSHOTS
from pipelines.generator.training.sharded_state import Fragment

STEPS, BATCH = 3_200, 10


@pytest.mark.parametrize("width", [0.01, *WIDTHS, 0.28])
def test_the_profile_has_the_width(width):
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = t ** exponent(width)
    profile /= profile.sum()
    mean = (profile * t).sum()
    assert np.sqrt((profile * (t - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)


def test_the_exponents_are_those_of_edm2():
    assert [exponent(width) for width in STORED] == pytest.approx([16.97, 6.94], abs=5e-3)


@pytest.mark.parametrize("power", [1, 2, 5])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_average_of_a_power_of_time_is_its_closed_form(width, power):
    """The mean of s**p weighted with s**x up to t is (x + 1) / (x + 1 + p) t**p."""
    weights = torch.zeros(1, dtype=torch.float64)
    ema = Ema([weights], width)
    for step in range(1, STEPS + 1):
        weights.fill_((step / STEPS) ** power)
        ema.update(BATCH, step * BATCH)
    x = exponent(width)
    assert ema.averages[0].item() == pytest.approx((x + 1) / (x + 1 + power), rel=1e-3)


def walk(seed=0, dims=64):
    """Weights after each step: a random walk, as of training at a constant learning rate."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, dims, generator=generator, dtype=torch.float64).cumsum(0)


def averages(path, widths):
    """The EMAs (steps, dims) of these widths after each step of a path."""
    weights = torch.zeros_like(path[0])
    emas, found = [Ema([weights], width) for width in widths], [[] for _ in widths]
    for step, now in enumerate(path, 1):
        weights.copy_(now)
        for ema, values in zip(emas, found, strict=True):
            ema.update(BATCH, step * BATCH)
            values.append(ema.averages[0].clone())
    return [torch.stack(values) for values in found]


@pytest.fixture(scope="module")
def averaged():
    """A random walk, and its EMAs by width."""
    path, widths = walk(), sorted({*STORED, *WIDTHS, 0.06})
    return path, dict(zip(widths, averages(path, widths), strict=True))


def reconstructed(averaged, snapshots, width):
    """The relative error of an EMA from so many snapshots, and that of its profile."""
    _, emas = averaged
    steps = [STEPS * k // snapshots for k in range(1, snapshots + 1)]
    rows, error = combination([step * BATCH for step in steps], width)
    found = sum(coefficient * emas[stored][step - 1] for step, row in zip(steps, rows, strict=True)
                for stored, coefficient in zip(STORED, row, strict=True))
    return ((found - emas[width][-1]).norm() / (averaged[0][-1] - emas[width][-1]).norm()).item(), error


@pytest.mark.parametrize("width", WIDTHS)
def test_any_width_comes_out_of_16_snapshots_of_two(averaged, width):
    difference, error = reconstructed(averaged, 16, width)
    assert error < 0.04
    assert difference < 0.04


def test_more_snapshots_are_closer(averaged):
    errors = [reconstructed(averaged, snapshots, 0.06) for snapshots in (2, 4, 8, 16)]
    for column in zip(*errors, strict=True):
        assert list(column) == sorted(column, reverse=True)
        assert column[-1] < column[0] / 8


@pytest.mark.parametrize("width", STORED)
def test_a_stored_width_is_the_last_snapshot_itself(width):
    coefficients, error = combination([100, 250, 1_000], width)
    expected = np.zeros((3, 2))
    expected[-1, STORED.index(width)] = 1
    np.testing.assert_allclose(coefficients, expected, atol=1e-9)
    assert error < 1e-6


def save(folder, images, emas):
    """A checkpoint of the EMAs at so many images, of one parameter."""
    [dims] = emas[STORED[0]][0].shape
    layout = Layout([average_name(width) for width in STORED], {"w": [dims]}, [[Fragment("w", 0, 0, dims)]])
    target, step = folder / checkpoint.directory_name(images), images // BATCH
    checkpoint.write_vectors(target, layout, 0, {average_name(w): emas[w][step - 1].float() for w in STORED})
    checkpoint.write_state(target, layout, Cursor(images, step, "f"))


@pytest.fixture
def trained(averaged, tiny, tmp_path):
    """The training of the random walk, with 8 snapshots; the checkpoint is at the end of 7 of these."""
    folder = Folder(str(tmp_path / "train"))
    spec = TrainingSpec(tiny("validate.images=8"), "f", folder, Folder(""), None, [0.0], [1.0])
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


NAN = float("nan")


@pytest.mark.parametrize(("settings", "distances", "expected"), [
    ([], {0.03: 5.0, 0.05: 4.0, 0.075: 3.0, 0.1: 2.0, 0.15: 2.5}, 0.1),
    ([], {0.03: 1.0, 0.05: NAN, 0.075: 3.0, 0.1: NAN, 0.15: 2.5}, 0.03),
    ([], {}, DEFAULT_WIDTH),
    (["trainer.ema_width=0.2"], {0.03: 1.0}, 0.2),
    (["validate.images=0"], {}, DEFAULT_WIDTH),
    (["validate.images=0", "trainer.ema_width=0.05"], {}, 0.05),
], ids=["lowest", "non-finite", "one-image", "asked", "none", "asked-none"])
def test_the_width_with_the_lowest_distance_is_exported(tiny, monkeypatch, settings, distances, expected):
    def measure(resources, function, width, frechet):
        assert frechet == ("trainer.ema_width=0.2" not in settings)
        return {"val_loss": 0.1} | ({"val_frechet": distances[width]} if width in distances else {})

    monkeypatch.setattr(average, "run_on_accelerator", measure)
    spec = TrainingSpec(tiny("validate.images=8", *settings), "f", Folder(""), Folder(""), None, [0.0], [1.0])
    width, measured = choose_width(TrainedModel(spec, Folder(""), Folder(""), Folder("")), Resources(2, 0, 2))
    assert width == expected
    assert set(measured) == (set() if "validate.images=0" in settings else {0.2} if expected == 0.2 else set(WIDTHS))
