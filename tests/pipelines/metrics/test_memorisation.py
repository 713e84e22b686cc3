import pytest
import torch

from pipelines.metrics import fidelity
from pipelines.metrics.memorisation import memorisation, nearest_neighbours


def normal(rows: int, seed: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


TRAIN, HELD_OUT, FRESH = normal(800, 0), normal(2000, 1), normal(2000, 2)


@pytest.mark.parametrize("block", [3, 2048])
def test_nearest_neighbours_equal_the_direct_computation(monkeypatch, block):
    monkeypatch.setattr(fidelity, "MAX_ROWS", block)
    train, query = normal(40, 0), normal(31, 1)
    direct = (query[:, None] - train[None]).norm(dim=2).min(dim=1)
    distance, index = nearest_neighbours(train, query)
    assert torch.allclose(distance, direct.values)
    assert torch.equal(index, direct.indices)


def test_copied_rows_are_at_distance_zero_from_their_original():
    order = torch.tensor([5, 0, 3])
    distance, index = nearest_neighbours(TRAIN + 1000, (TRAIN + 1000)[order])
    assert torch.equal(distance, torch.zeros(3))
    assert torch.equal(index, order)


def test_a_copying_generator_is_reported():
    result = memorisation(TRAIN, TRAIN.flip(0), HELD_OUT)
    assert result["copies"] == 1
    assert result["nearest_median"] == 0 < result["nearest_floor_median"]
    assert torch.equal(result["nearest_index"], torch.arange(len(TRAIN)).flip(0))
    assert torch.equal(result["nearest_distance"], torch.zeros(len(TRAIN)))


def test_a_fresh_draw_scores_the_floor():
    result = memorisation(TRAIN, FRESH, HELD_OUT)
    assert result["copies"] == pytest.approx(0.01, abs=0.008)
    assert result["copies_floor"] == pytest.approx(0.01, abs=0.008)
    assert result["nearest_median"] == pytest.approx(result["nearest_floor_median"], rel=0.05)


def test_a_part_of_copies_is_measured_as_that_part():
    mixed = torch.cat([TRAIN[:300] + 1e-4, FRESH[:700]])
    assert memorisation(TRAIN, mixed, HELD_OUT)["copies"] == pytest.approx(0.3 + 0.7 * 0.01, abs=0.01)


def test_floor_is_cross_fitted_between_even_and_odd_rows():
    origin = torch.zeros(1, 2)
    held_out = torch.tensor([[10.0, 0], [1, 0]]).repeat(20, 1)
    assert memorisation(origin, origin, held_out)["copies_floor"] == 0.5
    assert memorisation(origin, origin, held_out[::2] + torch.arange(20)[:, None])["copies_floor"] == 0.05


def test_exact_copies_are_seen_even_where_held_out_leaks_into_train():
    result = memorisation(TRAIN, TRAIN[:50], torch.cat([HELD_OUT, TRAIN[:200]]))
    assert result["copies"] == 1
    assert result["copies_floor"] > 0.05


def test_bad_input_is_rejected():
    with pytest.raises(ValueError, match="at least 4 held-out"):
        memorisation(TRAIN, FRESH, HELD_OUT[:3])
    with pytest.raises(ValueError, match="0 synthetic"):
        memorisation(TRAIN, FRESH[:0], HELD_OUT)
    with pytest.raises(ValueError, match="0 query"):
        nearest_neighbours(TRAIN, FRESH[:0])
    with pytest.raises(ValueError, match="1 of 1 query"):
        nearest_neighbours(TRAIN, torch.full((1, 6), torch.nan))
    with pytest.raises(ValueError, match="one feature extractor"):
        nearest_neighbours(TRAIN, FRESH[:, :5])
