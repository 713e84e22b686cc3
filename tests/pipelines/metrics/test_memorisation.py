import pytest
import torch

from pipelines.metrics import fidelity
from pipelines.metrics.memorisation import memorisation, nearest_neighbours


def normal(rows: int, seed: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def compare(train: torch.Tensor, synthetic: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Nearest neighbours in `train`, which comes in blocks, and what `memorisation` says of them."""
    return memorisation(*(nearest_neighbours(train.split(300), part)[0] for part in (synthetic, held_out)))


TRAIN, HELD_OUT, FRESH = normal(800, 0), normal(2000, 1), normal(2000, 2)


@pytest.mark.parametrize("rows", [1, 7, 40])  # in a block of train
@pytest.mark.parametrize("block", [3, 2048])
def test_nearest_neighbours_equal_the_direct_computation(monkeypatch, block, rows):
    monkeypatch.setattr(fidelity, "MAX_ROWS", block)
    train, query = normal(40, 0), normal(31, 1)
    direct = (query[:, None] - train[None]).norm(dim=2).min(dim=1)
    distance, index = nearest_neighbours(train.split(rows), query)
    assert torch.allclose(distance, direct.values)
    assert torch.equal(index, direct.indices)


def test_copied_rows_are_at_distance_zero_from_their_original():
    order = torch.tensor([5, 0, 3])
    distance, index = nearest_neighbours((TRAIN + 1000).split(2), (TRAIN + 1000)[order])
    assert torch.equal(distance, torch.zeros(3))
    assert torch.equal(index, order)


def test_a_copying_generator_is_reported():
    result = compare(TRAIN, TRAIN.flip(0), HELD_OUT)
    assert result["copies"] == 1
    assert result["nearest_median"] == 0 < result["nearest_floor_median"]


def test_a_fresh_draw_scores_the_floor():
    result = compare(TRAIN, FRESH, HELD_OUT)
    assert result["copies"] == pytest.approx(0.01, abs=0.008)
    assert result["copies_floor"] == pytest.approx(0.01, abs=0.008)
    assert result["nearest_median"] == pytest.approx(result["nearest_floor_median"], rel=0.05)


def test_a_part_of_copies_is_measured_as_that_part():
    mixed = torch.cat([TRAIN[:300] + 1e-4, FRESH[:700]])
    assert compare(TRAIN, mixed, HELD_OUT)["copies"] == pytest.approx(0.3 + 0.7 * 0.01, abs=0.01)


def test_floor_is_cross_fitted_between_even_and_odd_rows():
    origin = torch.zeros(1, 2)
    held_out = torch.tensor([[10.0, 0], [1, 0]]).repeat(20, 1)
    assert compare(origin, origin, held_out)["copies_floor"] == 0.5
    assert compare(origin, origin, held_out[::2] + torch.arange(20)[:, None])["copies_floor"] == 0.05


def test_exact_copies_are_seen_even_where_held_out_leaks_into_train():
    result = compare(TRAIN, TRAIN[:50], torch.cat([HELD_OUT, TRAIN[:200]]))
    assert result["copies"] == 1
    assert result["copies_floor"] > 0.05


def test_bad_input_is_rejected():
    with pytest.raises(ValueError, match="at least 4 held-out"):
        memorisation(torch.ones(5), torch.ones(3))
    with pytest.raises(ValueError, match="0 synthetic"):
        memorisation(torch.ones(0), torch.ones(5))
    with pytest.raises(ValueError, match="0 query"):
        nearest_neighbours([TRAIN], FRESH[:0])
    with pytest.raises(ValueError, match="0 training"):
        nearest_neighbours([], FRESH)
    with pytest.raises(ValueError, match="1 of 1 query"):
        nearest_neighbours([TRAIN], torch.full((1, 6), torch.nan))
    with pytest.raises(ValueError, match="one feature extractor"):
        nearest_neighbours([TRAIN], FRESH[:, :5])
