"""The phantom thorax: one film per (seed, index), exact masks, and labels that can be seen."""

import numpy as np
import pytest

from pipelines.data.phantom import LABELS, PREVALENCE, STUDIES_PER_PATIENT, render

FILMS = 240


@pytest.fixture(scope="module")
def films():
    return [render(7, index) for index in range(FILMS)]


def _width(mask):
    columns = np.flatnonzero(mask.any(axis=0))
    return columns[-1] - columns[0] + 1


def _midline(film):
    """Column halfway between the outer borders of the lungs."""
    return np.flatnonzero(film.lungs.any(axis=0))[[0, -1]].mean()


def _overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def _auc(scores, truth):
    """Probability that a positive scores above a negative."""
    scores, truth = np.asarray(scores), np.asarray(truth, dtype=bool)
    return (scores[truth][:, None] > scores[~truth][None, :]).mean()


@pytest.mark.parametrize("size", [28, 64, 129])
def test_shapes_and_types(size):
    film = render(0, 3, size)
    assert film.image.shape == film.lungs.shape == film.heart.shape == (size, size)
    assert film.image.dtype == np.uint8
    assert film.lungs.dtype == film.heart.dtype == np.bool_


def test_same_arguments_give_the_same_film():
    first, again = render(5, 17), render(5, 17)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.lungs, again.lungs)
    assert (first.labels, first.patient_id, first.study_id) == (again.labels, again.patient_id, again.study_id)


@pytest.mark.parametrize("other", [(6, 17), (5, 18), (5, 17 + STUDIES_PER_PATIENT)])
def test_seed_study_and_patient_change_the_film(other):
    base, film = render(5, 17), render(*other)
    assert base.study_id != film.study_id
    assert np.abs(base.image.astype(float) - film.image).mean() > 3


@pytest.mark.parametrize("index", range(0, 24, 5))
def test_anatomy_does_not_depend_on_size(index):
    small, large = render(2, index, 64), render(2, index, 256)
    assert small.labels == large.labels
    for name in ("lungs", "heart"):
        coarse = getattr(large, name).reshape(64, 4, 64, 4).mean(axis=(1, 3)) > 0.5
        assert _overlap(getattr(small, name), coarse) > 0.93
    blocks = large.image.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    assert np.corrcoef(small.image.ravel(), blocks.ravel())[0, 1] > 0.97


def test_masks_are_disjoint_and_of_plausible_area(films):
    for film in films:
        assert not (film.lungs & film.heart).any()
        assert 0.1 < film.lungs.mean() < 0.5
        assert 0.03 < film.heart.mean() < 0.25


def test_film_shows_dark_lungs_beside_a_bright_heart_on_the_image_right(films):
    for film in films:
        assert film.image[film.lungs].mean() + 25 < film.image[film.heart].mean()
        assert np.nonzero(film.heart)[1].mean() > _midline(film)


def test_right_diaphragm_dome_is_higher(films):
    film = next(film for film in films if not film.labels)
    left_half, right_half = film.lungs[:, :32], film.lungs[:, 32:]
    assert np.nonzero(left_half)[0].max() <= np.nonzero(right_half)[0].max() + 1


def test_patient_has_several_studies_of_one_anatomy(films):
    by_patient = {}
    for film in films:
        by_patient.setdefault(film.patient_id, []).append(film)
    assert len(by_patient) == FILMS // STUDIES_PER_PATIENT
    assert len({film.study_id for film in films}) == FILMS
    for studies in by_patient.values():
        assert len(studies) == STUDIES_PER_PATIENT
        assert len({"cardiomegaly" in film.labels for film in studies}) == 1
    within = [np.ptp([_width(film.heart) for film in studies]) for studies in by_patient.values()]
    between = np.ptp([_width(studies[0].heart) for studies in by_patient.values()])
    assert max(within) < between / 2


@pytest.mark.parametrize("index", range(0, 160, 20))
def test_cardiothoracic_ratio_tells_cardiomegaly(index):
    film = render(7, index, 256)
    ratio = _width(film.heart) / _width(film.lungs | film.heart)
    assert ratio > 0.55 if "cardiomegaly" in film.labels else ratio < 0.5


def test_prevalences_and_independence():
    films = [render(1, index, 16) for index in range(1600)]
    truth = np.array([[name in film.labels for name in LABELS] for film in films])
    assert np.allclose(truth.mean(axis=0), [PREVALENCE[name] for name in LABELS], atol=0.06)
    assert np.abs(np.corrcoef(truth.T)[np.triu_indices(3, 1)]).max() < 0.1


def test_opacity_brightens_one_lung_over_the_other(films):
    def side_difference(film):
        first = np.arange(film.image.shape[1]) < _midline(film)
        return abs(film.image[film.lungs & first].mean() - film.image[film.lungs & ~first].mean())

    dry = [film for film in films if "effusion" not in film.labels]
    opaque = np.array(["opacity" in film.labels for film in dry])
    brightness = np.array([film.image[film.lungs].mean() for film in dry])
    assert brightness[opaque].mean() > brightness[~opaque].mean() + 3
    assert _auc([side_difference(film) for film in dry], opaque) > 0.75


def test_effusion_whitens_a_lung_base(films):
    def base_over_apex(film):
        low, high = np.quantile(np.nonzero(film.lungs)[0], [0.35, 0.85])
        row, column = np.indices(film.image.shape)
        basal, first = film.lungs & (row > high), column < _midline(film)
        whitest = max(film.image[side].mean() for side in (basal & first, basal & ~first) if side.any())
        return whitest - film.image[film.lungs & (row < low)].mean()

    assert _auc([base_over_apex(film) for film in films], ["effusion" in film.labels for film in films]) > 0.85


@pytest.mark.parametrize(("index", "size", "value"), [(0, 15, "15"), (-3, 64, "-3")])
def test_bad_arguments_are_named(index, size, value):
    with pytest.raises(ValueError, match=value):
        render(0, index, size)
