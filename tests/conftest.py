"""Fixtures shared by all tests: one small Ray cluster, and settings small enough for seconds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from pydicom.uid import generate_uid

from pipelines.graph.compose import load_settings
from pipelines.tables.parquet import read_shard

os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15: the tests of the other process would starve Ray's


def pin_to_own_cores() -> None:
    """Each process of pytest-xdist, with all that it starts, runs on cores of its own.

    OpenMP threads that wait for one another spin: on shared cores two processes took four times the time of both alone.
    """
    index, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[index % count :: count] or cores)


if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    pin_to_own_cores()

REAL_DATA = Path(os.environ.get("RAYOGRAPH_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

TINY = (
    "data.size=32", "data.images=160", "data.shard_rows=32",
    "autoencoder.images=128", "autoencoder.channels=[8,16,16]", "autoencoder.batch=16",
    "encoder.images=128", "encoder.batch=32", "encoder.prototypes=64",
    "encoder.options={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "denoiser.channels=[16,32]", "denoiser.attention=[false,true]", "denoiser.norm_groups=8", "denoiser.head_dim=8",
    "denoiser.cross_attention_dim=32",
    "trainer.images=256", "trainer.batch=32", "trainer.checkpoint_every=64", "trainer.checkpoint_seconds=0",
    "trainer.log_every=32", "trainer.wait_seconds=0", "trainer.ema_snapshots=1",
    "validate.images=0",
    "sample.images=48", "sample.shard_rows=16", "sample.batch=8", "sample.steps=4",
    "evaluate.images=40", "evaluate.pairs=10",
    "finetune.images=256", "finetune.batch=32", "finetune.channels=[8,16]",
)


def pytest_collection_modifyitems(items) -> None:
    """The longest files first, or they would be left to one process at the end."""
    places = {"test_run.py": 0, "test_held_out.py": 1}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def empty(folder) -> None:
    """Remove all that a folder holds, whoever's it is."""
    folder.filesystem.delete_dir_contents(folder.path, missing_dir_ok=True)


def whole(folder) -> pa.Table:
    """All of a small table."""
    return pa.concat_tables([read_shard(folder, name) for name in folder.names(".parquet")])


@pytest.fixture
def tiny(tmp_path):
    """Settings of a phantom run that takes seconds; more overrides may be given."""

    def compose(*overrides: str):
        return load_settings(*TINY, f"storage={tmp_path}", "name=run", *overrides)

    return compose


@pytest.fixture(scope="session")
def ray_cluster():
    """The one Ray cluster of a test session; stages find it and leave it running."""
    import ray

    ray.init("local", num_cpus=4, object_store_memory=256 << 20, include_dashboard=False, log_to_driver=False,
             logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture
def real_data():
    """Path of a real data set below RAYOGRAPH_TEST_DATA (or ../shared/data)."""

    def find(name: str) -> Path:
        if not (REAL_DATA / name).exists():
            pytest.skip(f"{REAL_DATA / name} is not here; set RAYOGRAPH_TEST_DATA")
        return REAL_DATA / name

    return find


@pytest.fixture
def film():
    """Writes a DICOM radiograph with the elements that are given."""
    def write(path: Path, seed: int, **elements: str) -> None:
        """A DICOM file of noise at different scales, so that no two are near-duplicates."""
        random = np.random.default_rng(seed)
        coarse = np.kron(random.integers(0, 4096, (8, 8)), np.ones((12, 12)))
        pixels = (coarse + random.integers(0, 300, (96, 96))).astype(np.uint16)
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
        dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CR", "MONOCHROME2", 1
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.PixelData = pixels.tobytes()
        for name, value in elements.items():
            setattr(dataset, name, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)

    return write
