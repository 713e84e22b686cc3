"""Strategies stay on the manifold, keep labels, and name their sources."""

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import Folder
from pipelines.generator.latents.spec import write_latents, write_spec
from pipelines.tables.parquet import read_split, tensors
from synth.conditions import Pool, find_strategy, read_pool_index, slerp

N, D = 40, 16


@pytest.fixture
def pool(tmp_path):
    random = np.random.default_rng(0)
    values = {"latent_mean": random.normal(size=(N, 1, 2, 2)), "embedding": random.normal(size=(N, D)),
              "patches": random.normal(size=(N, 4, D))}
    columns = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(value.astype(np.float16))
               for name, value in values.items()}
    table = pa.table({"image_id": [f"id{k}" for k in range(N)], **columns, "split": ["train"] * N,
                      "source": ["s"] * N, "labels": [["sick"] if k % 4 == 0 else [] for k in range(N)],
                      "absent": [["sick"] if k % 4 == 1 else [] for k in range(N)]})
    write_latents(Folder(str(tmp_path)), 0, table)
    write_spec(Folder(str(tmp_path)))
    return Pool(Folder(str(tmp_path)), read_pool_index(Folder(str(tmp_path))))


@pytest.mark.parametrize("name", ["reconstruction", "interpolation"])
def test_a_condition_is_a_function_of_its_seed_and_carries_its_sources_labels(pool, name):
    strategy = find_strategy(name)
    first, again, other = (strategy(pool, np.random.default_rng([0, index])) for index in (1, 1, 2))
    assert first.values.keys() == {"embedding", "patches", "labels"}
    assert all((first.values[key] == again.values[key]).all() for key in first.values)
    assert first.sources == again.sources
    for name in ("embedding", "patches"):
        assert not np.array_equal(first.values[name], other.values[name])
    for seed in range(30):
        condition = strategy(pool, np.random.default_rng(seed))
        states = {{0: 1, 1: 0}.get(int(source[2:]) % 4, -1) for source in condition.sources}
        assert states == {condition.values["labels"][0]}, "present, absent and unknown do not mix"


def test_reconstruction_is_a_real_embedding(pool):
    condition = find_strategy("reconstruction")(pool, np.random.default_rng(3))
    row = pool.image_ids.to_pylist().index(condition.sources[0])
    embedding = tensors(read_split(pool.rows.latents, "train-00000.parquet", ["embedding"], "train"), "embedding")
    assert (condition.values["embedding"] == embedding[row]).all()


def test_slerp_keeps_length_and_meets_its_ends():
    a, b = np.eye(D, dtype=np.float32)[:2] * 4
    assert np.allclose(slerp(a, b, 0), a, atol=1e-6)
    assert np.allclose(slerp(a, b, 1), b, atol=1e-6)
    assert np.linalg.norm(slerp(a, b, 0.3)) == pytest.approx(4, rel=1e-5)
    assert np.allclose(slerp(a, a, 0.5), a)
    both = slerp(np.stack([a, a]), np.stack([b, a]), 0.3)
    assert np.allclose(both[0], slerp(a, b, 0.3))
    assert np.allclose(both[1], a)


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="telepathy"):
        find_strategy("telepathy")
