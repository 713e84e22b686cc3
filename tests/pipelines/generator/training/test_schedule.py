"""The learning rate as a function of the images seen."""

import pytest

from pipelines.generator.training.schedule import learning_rate
from pipelines.generator.training.settings import TrainerSettings


def rates(**options):
    settings = TrainerSettings(images=1_000, lr=2.0, warmup_images=100, final_lr_fraction=0.1, **options)
    return [learning_rate(settings, seen) for seen in (0, 50, 100, 550, 1_000)]


def test_cosine_ends_at_its_fraction():
    assert rates() == pytest.approx([0, 1, 2, 2 * (0.1 + 0.9 / 2), 0.2])


def test_constant_stays():
    assert rates(schedule="constant") == pytest.approx([0, 1, 2, 2, 2])


def test_inverse_sqrt_falls_with_the_root_of_the_images_once_it_begins():
    assert rates(schedule="inverse_sqrt", decay_after_images=250) == pytest.approx(
        [0, 1, 2, 2 * (250 / 550) ** 0.5, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "inverse_sqrt"])
def test_no_warm_up_starts_at_the_full_rate(schedule):
    settings = TrainerSettings(images=1_000, lr=2.0, warmup_images=0, schedule=schedule)
    assert learning_rate(settings, 0) == 2.0
