"""`rayograph run` as a user types it, on a phantom of seconds: what it leaves, what a second run does, and what SIGKILL
at any stage changes (nothing).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from PIL import Image
from safetensors.numpy import load_file

from cluster.session import Resources
from pipelines.generator.training import checkpoint
from pipelines.generator.training.average import TrainedModel
from pipelines.generator.training.stage import training_spec
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan

RAYOGRAPH = shutil.which("rayograph", path=os.path.dirname(sys.executable))
SIZES = (*TINY, "data.images=480", "trainer.images=1024", "trainer.checkpoint_every=160", "trainer.log_every=96",
         "trainer.ema_snapshots=8", "sample.images=96", "sample.actors=1", "data.val_fraction=0.2",
         "encoder.options.embed_dim=16")
SHARDED = ("trainer.workers=2", "trainer.zero3_persistence=0")
STAGES = ("ingest", "autoencoder", "encoder", "latents", "train", "sample", "evaluate", "finetune", "report", "publish")
SECONDS = 1500  # for one run, on one core of a slow machine


def command(storage: Path, *overrides: str, stage: str = "run") -> list[str]:
    return [str(RAYOGRAPH), stage, *SIZES, f"storage={storage}", "name=run", *overrides]


def run(storage: Path, *overrides: str, stage: str = "run") -> str:
    """Run to the end.  Returns all it printed."""
    done = subprocess.run(command(storage, *overrides, stage=stage), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def kill_when(storage: Path, holds, *overrides: str, stage: str = "run") -> None:
    """Start a run and SIGKILL it, with no warning, as soon as `holds()`."""
    process = subprocess.Popen(command(storage, *overrides, stage=stage), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def record(storage: Path, stage: str) -> dict:
    return json.loads((storage / "run" / stage / "stage.json").read_text())


def table(storage: Path, folder: str) -> dict[str, list]:
    """The rows of a table by column, in order; shard by shard as they were committed."""
    files = sorted((storage / "run" / folder).glob("*.parquet"))
    rows: dict[str, list] = {}
    for file in files:
        for name, values in pq.read_table(file).to_pydict().items():
            rows.setdefault(name, []).extend(values)
    return rows


@pytest.fixture(scope="module", autouse=True)
def one_salt():
    """All storages hash identifiers alike, so that their tables can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYOGRAPH_SALT", "of these tests")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Storage of one unbroken run of two workers, which the tests only read or copy."""
    storage = tmp_path_factory.mktemp("finished")
    run(storage, "validate.images=64", "validate.steps=4", "validate.every=1000000", "validate.frechet_images=16",
        "trainer.milestone_every=480", *SHARDED)
    return storage


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.ray
def test_a_run_leaves_every_stage_the_report_and_what_it_publishes(finished):
    folder = finished / "run"
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    for stage in STAGES:
        assert record(finished, stage)["stage"] == stage
        assert metrics[stage]["seconds"] > 0
        assert metrics[stage]["peak_rss_mb"] > 0
    wanted = {
        "ingest": ("images", "quarantined", "images_per_second"), "latents": ("images_per_second",),
        "autoencoder": ("psnr",), "train": ("images", "images_per_second", "data_wait_fraction", "loss", "val_loss",
                                                                   "val_frechet"),
        "sample": ("images", "images_per_second"),
        "evaluate": ("frechet", "frechet_floor", "precision", "recall", "density", "coverage", "ms_ssim", "extractor",
                     "dim", "n"),
        "finetune": ("real", "synthetic", "mixed"),
    }
    for stage, names in wanted.items():
        assert set(names) <= metrics[stage].keys(), stage
    assert metrics["train"]["images"] == 1024
    assert metrics["sample"]["images"] == 96
    assert (folder / "report" / "index.html").read_text().startswith("<!")
    assert (folder / "publish" / "generator" / "model_index.json").exists()
    [measured] = [json.loads(line) for line in (folder / "train" / "validation.jsonl").read_text().splitlines()]
    assert measured["images"] == 1024
    assert measured["val_loss"] > 0
    distances = metrics["train"]["val_frechet_by_length"]
    assert float(min(distances, key=distances.get)) == metrics["train"]["ema_length"]
    assert metrics["train"]["val_frechet"] == min(distances.values())
    assert len(list((folder / "train" / "snapshots").iterdir())) == 7
    assert "val_loss_noise_1" in measured
    assert [file.name for file in sorted((folder / "train" / "milestones").iterdir())] == [
        "images-000000000480", "images-000000000960", "images-000000001024"]
    assert list((folder / "train/milestones/images-000000000480").glob("ema-0.1-00000-*.safetensors"))
    with Image.open(folder / "train" / "samples" / "images-000000001024.png") as picture:
        assert picture.size[0] > 8 * 32


@pytest.mark.ray
def test_no_test_patient_reaches_what_learns(finished):
    images, latents, corpus = (table(finished, name) for name in ("ingest/images", "latents", "sample/corpus"))
    patients = {split: {p for p, s in zip(images["patient_id"], images["split"], strict=True) if s == split}
                for split in ("train", "val", "test")}
    assert not patients["train"] & (patients["val"] | patients["test"])
    train = {i for i, split in zip(latents["image_id"], latents["split"], strict=True) if split == "train"}
    assert {source for sources in corpus["source_image_ids"] for source in sources} <= train
    assert sorted(images["image_id"]) == sorted(latents["image_id"])


@pytest.mark.ray
def test_the_latents_report_tells_what_the_tables_hold(finished):
    from cluster.storage import Folder
    from pipelines.generator.latents.report import latents_report

    told = latents_report(Folder(str(finished / "run")))
    latents = table(finished, "latents")
    train = np.array([split == "train" for split in latents["split"]])
    mean = np.stack(latents["latent_mean"]).reshape(len(train), 4, -1)[train].astype(np.float64)
    norms = np.linalg.norm(np.stack(latents["embedding"])[train].astype(np.float64), axis=1)
    for figure in (f"{train.sum():,}", f"{norms.mean():.2f}", *(f"{m:.3f}" for m in mean.mean((0, 2)))):
        assert figure in told, f"{figure} is not in\n{told}"


@pytest.mark.ray
def test_the_published_generator_samples_without_this_project(finished, tmp_path):
    script = f"""
import sys
sys.modules.update(dict.fromkeys(("pipelines", "cluster", "synth", "tuning")))
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(finished / "run/publish/generator")!r},
    custom_pipeline={str(finished / "run/publish/generator")!r}, trust_remote_code=True)
image = pipe(num_inference_steps=2).images[0]
assert image.size == (32, 32), image.size
assert pipe(image=image, num_inference_steps=2).images[0].mode == "L"
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, cwd=tmp_path,
                          env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.ray
def test_the_published_corpus_opens_with_its_images_decoded(finished, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(str(f) for f in (finished / "run/publish/corpus").rglob("*.parquet"))
    corpus = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert len(corpus) == 96
    assert corpus[0]["image"].size == (32, 32)
    assert len(set(corpus["image_id"])) == 96


@pytest.mark.ray
def test_a_second_run_does_nothing_and_a_changed_setting_redoes_its_stage_and_what_follows(copied):
    before = {stage: record(copied, stage)["started"] for stage in STAGES}
    assert "nothing to do" in run(copied)
    assert {stage: record(copied, stage)["started"] for stage in STAGES} == before
    run(copied, "evaluate.images=30")
    changed = [stage for stage in STAGES if record(copied, stage)["started"] != before[stage]]
    assert changed == ["evaluate", "report", "publish"]


COMMITTED = {"ingest": "ingest/images/part-*.parquet", "autoencoder": "autoencoder/metrics.jsonl",
             "encoder": "encoder/metrics.jsonl", "latents": "latents/train-*.parquet",
             "train": "train/checkpoints/checkpoint_manager_snapshot.json", "sample": "sample/corpus/part-*.parquet",
             "evaluate": "evaluate/begun.json", "finetune": "finetune/real/arm.json"}


@pytest.mark.ray
@pytest.mark.parametrize("stages", [
    pytest.param(("autoencoder", "train", "sample"), id="some"),
    pytest.param(COMMITTED, id="every", marks=pytest.mark.slow)])
def test_sigkill_in_any_stage_changes_nothing(finished, tmp_path, stages):
    """The run is killed in each of `stages` once it has committed a part of its work."""
    folder = tmp_path / "run"
    for stage in stages:
        kill_when(tmp_path, lambda stage=stage: any(folder.glob(COMMITTED[stage])))
        assert not (folder / stage / "stage.json").exists(), f"{stage} was over before the kill"
        if stage == "train":  # as if killed while Ray wrote it
            (folder / COMMITTED[stage]).write_text("")
    run(tmp_path)
    assert table(tmp_path, "ingest/images") == table(finished, "ingest/images")
    assert table(tmp_path, "latents")["image_id"] == table(finished, "latents")["image_id"]
    found, expected = table(tmp_path, "sample/corpus"), table(finished, "sample/corpus")
    assert found["index"] == expected["index"] == list(range(96))
    assert found["source_image_ids"] == expected["source_image_ids"]
    seen = [json.loads(line)["images"] for line in (folder / "train/metrics.jsonl").read_text().splitlines()]
    assert seen == sorted(set(seen))
    assert record(tmp_path, "train")["metrics"]["loss"] == pytest.approx(
        record(finished, "train")["metrics"]["loss"], rel=0.02)  # of one worker, and of two


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])  # test_loop.py kills two workers without Ray, which is quicker
def test_two_workers_train_save_resume_export_and_reload(copied, finished, stage):
    shutil.rmtree(copied / "run" / "train")
    sharding = (*SHARDED, f"trainer.zero_stage={stage}", "trainer.ema_length=0.06")
    snapshot = copied / "run/train/checkpoints/checkpoint_manager_snapshot.json"
    kill_when(copied, snapshot.exists, *sharding, stage="train")
    assert "resuming at" in run(copied, *sharding, stage="train")
    unbroken = Plan(load_settings(*SIZES, f"storage={finished}", "name=run")).stage("train", Resources(2, 0, 2))
    last = checkpoint.latest_complete(unbroken.folder / "checkpoints")
    average = TrainedModel(training_spec(unbroken), last, unbroken.folder, unbroken.folder).weights(0.06)
    one = {name.removeprefix("network."): value.numpy() for name, value in average.items() if "network." in name}
    two = load_file(copied / "run/train/generator/unet/diffusion_pytorch_model.safetensors")
    assert one.keys() == two.keys()
    gap = sum(((one[k] - two[k]) ** 2).sum() for k in one) ** 0.5 / sum((one[k] ** 2).sum() for k in one) ** 0.5
    assert gap < 0.005
    assert record(copied, "train")["metrics"]["loss"] == pytest.approx(record(finished, "train")["metrics"]["loss"],
                                                                       rel=0.02)


@pytest.mark.ray
def test_a_network_that_does_not_fit_the_latents_is_told_in_one_line(copied):
    done = subprocess.run(command(copied, "denoiser.architecture=dit", "denoiser.width=32", "denoiser.patch=3",
                                  "changed=redo", stage="train"), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "denoiser.patch=3" in done.stderr.splitlines()[-1]


def kill_workers(process: subprocess.Popen, title: str, times: int) -> int:
    """SIGKILL so many of the Ray processes of a run whose title holds `title`, half a second apart."""
    import psutil

    killed, deadline = 0, time.monotonic() + SECONDS
    while killed < times and process.poll() is None and time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if "ray::" in (told := " ".join(child.cmdline())) and title in told:
                    child.send_signal(signal.SIGKILL)
                    killed += 1
                    time.sleep(0.5)
                    break
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    return killed


@pytest.mark.ray
def test_killed_workers_of_ingest_lose_and_double_nothing(tmp_path):
    process = subprocess.Popen(command(tmp_path, "data.images=4000", stage="ingest"), stderr=subprocess.DEVNULL)
    assert kill_workers(process, "ConvertShard", 3) == 3
    assert process.wait(SECONDS) == 0
    found = table(tmp_path, "ingest/images")["image_id"]
    assert len(found) == len(set(found)) == 4000


@pytest.mark.ray
def test_a_killed_actor_of_latents_loses_and_doubles_nothing(copied):
    before = table(copied, "latents")["image_id"]
    shutil.rmtree(copied / "run" / "latents")
    process = subprocess.Popen(command(copied, "changed=redo", stage="latents"), stderr=subprocess.DEVNULL)
    assert kill_workers(process, "MapWorker(MapBatches(EncodeImages))", 1) == 1
    assert process.wait(SECONDS) == 0
    assert table(copied, "latents")["image_id"] == before


@pytest.mark.ray
def test_arms_share_their_inputs_and_meet_in_one_table(copied):
    """Two corpora of one generator, each with its own evaluation and classifiers: nothing before them is redone."""
    shared = ("ingest", "autoencoder", "encoder", "latents", "train")
    before = {stage: record(copied, stage)["started"] for stage in shared}
    run(copied, "graph=arms", *SHARDED)
    assert {stage: record(copied, stage)["started"] for stage in before} == before
    corpora = {name: table(copied, f"sample-{name}/corpus") for name in ("reconstruction", "interpolation")}
    assert {name: set(rows["strategy"]) for name, rows in corpora.items()} == {name: {name} for name in corpora}
    metrics = json.loads((copied / "run/report/metrics.json").read_text())
    page = (copied / "run/report/index.html").read_text()
    for node in ("evaluate-reconstruction", "evaluate-interpolation", "finetune-reconstruction",
                 "finetune-interpolation"):
        assert metrics[node]["seconds"] > 0
        assert node in page
    assert len(list((copied / "run/publish/corpus/data").glob("*.parquet"))) == 6
    assert "nothing to do" in run(copied, "graph=arms", *SHARDED)
