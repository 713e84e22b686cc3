"""Which label is learned, what is left out and why, and the training of one arm on a set that is easy to learn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load
from torchmetrics.functional.classification import binary_f1_score

from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data.labels import label_states
from pipelines.graph.plan import Plan
from pipelines.graph.stage import Stage
from pipelines.learning.readers import ArrayReader
from pipelines.learning.small_loop import CHECKPOINT
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import write_shard
from pipelines.tables.schemas import CORPUS, IMAGES
from tuning.finetune import examples
from tuning.finetune import stage as module
from tuning.finetune.classify import best_threshold, probabilities, residual_network, train
from tuning.finetune.examples import count, count_findings, draw_examples, embedding_reader
from tuning.finetune.stage import RESULT, choose_target, finetune, missing_class, no_target

SIDE = 32


def states_of(labels, absent=None) -> pa.Table:
    kind = pa.list_(pa.string())
    return pa.table({"labels": pa.array(labels, kind), "absent": pa.array(absent or [[]] * len(labels), kind)})


@pytest.mark.parametrize(("labels", "requested", "target"), [
    ([["No Finding"], ["No Finding"], ["Pneumonia"]], None, "Pneumonia"),
    ([["No Finding"], ["Pneumonia"]], "PNEUMONIA", "Pneumonia"),
    ([["effusion"], ["effusion"], ["effusion", "Lung Opacity"], []], None, "Lung Opacity"),
    ([["effusion"], ["effusion"], ["nodule"]], None, "effusion"),
    ([["No Finding"], ["No Finding"], ["nodule"]], None, "nodule"),
    ([["0"], ["0"], ["1"]], None, "1"),
    ([["abnormal"], ["No Finding"], ["No Finding"]], None, "abnormal"),
    ([["b"], ["a"]], None, "a"),
    ([["effusion"], ["pneumonia"]], "effusion", "effusion"),
    ([["effusion"]], "efusion", None),
    ([[], []], None, None),
])
def test_target_is_requested_or_opacity_like_or_most_frequent_abnormal(labels, requested, target):
    assert choose_target(*count_findings([states_of(labels)]), requested) == target


def test_a_target_that_is_known_to_be_absent_somewhere_goes_before_one_that_is_not():
    labels = states_of([["Lung Opacity"], ["Edema"], []], [[], [], ["Edema"]])
    assert choose_target(*count_findings([labels]), None) == "Edema"


def test_reason_names_the_labels_there_are():
    assert "no labels" in no_target(Counter(), None)
    assert no_target(Counter(["effusion", "edema"]), "efusion") == \
        "finetune.target=efusion is not among the labels (edema, effusion)"


@pytest.mark.parametrize(("labels", "absent", "reason"), [
    ([["x"], []], [[], ["x"]], None),
    ([["x"], []], [[], []], "the test split has no image known to be without x"),
    ([[], ["y"]], [["x"], []], "the test split has no image with x"),
    ([], [], "the test split has no image with x"),
])
def test_a_part_of_one_class_is_named(labels, absent, reason):
    assert missing_class("test", count(label_states(states_of(labels, absent), ["x"])[:, 0]), "x") == reason


def test_threshold_has_the_highest_f1():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(200, generator=generator) < 0.3
    scores = torch.sigmoid(torch.randn(200, generator=generator) + 1.5 * targets)
    found = binary_f1_score(scores, targets.int(), best_threshold(scores, targets))
    assert found == max(binary_f1_score(scores, targets.int(), t) for t in np.linspace(0, 1, 1001))


def test_threshold_lies_midway_between_separated_classes():
    assert best_threshold(torch.tensor([0.1, 0.2, 0.6, 0.9]), torch.tensor([0, 0, 1, 1])) == pytest.approx(0.4)


def test_threshold_of_one_class_is_neutral():
    assert best_threshold(torch.tensor([0.1, 0.9]), torch.tensor([1, 1])) == 0.5


def toy_images(n: int, seed: int) -> tuple[list[np.ndarray], list[list[str]]]:
    """Gray noise, with a bright disc anywhere in the positive half of the images."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    images, labels = [], []
    for index in range(n):
        image = random.normal(100, 20, (SIDE, SIDE))
        if index % 2:
            y, x = random.uniform(8, SIDE - 8, 2)
            image[(rows - y) ** 2 + (columns - x) ** 2 < 25] += 80
        images.append(image.clip(0, 255).astype(np.uint8))
        labels.append(["opacity"] if index % 2 else [])
    return images, labels


def write_toy(folder: Folder, schema: pa.Schema, n: int, seed: int, shard: int = 0, **same) -> None:
    images, labels = toy_images(n, seed)
    absent = [[] if present else ["opacity"] for present in labels]
    columns = {"image_id": [f"{shard}-{k}" for k in range(n)], "image": [encode_png(image) for image in images],
               "labels": labels, "absent": absent} | {k: [v] * n for k, v in same.items()}
    write_shard(folder, shard, pa.table({field.name: pa.array(columns.get(field.name, [None] * n), field.type)
                                         for field in schema}, schema=schema))


@pytest.fixture
def stage(tiny, monkeypatch) -> Stage:
    """The stage over toy tables, computing in this process."""
    monkeypatch.setattr(module, "run_on_accelerator", lambda resources, function, *work: function(*work))
    stage = Plan(tiny("finetune.images=800", "finetune.lr=0.005")).stage("finetune", Resources(1, 0, 1))
    for shard, (split, n) in enumerate({"train": 200, "val": 60, "test": 60}.items()):
        write_toy(stage.input("ingest") / "images", IMAGES, n, shard, shard, split=split)
    return stage


def test_images_whose_target_is_unknown_take_part_in_nothing(stage, monkeypatch):
    """Half of all images are unlabelled, and half of these show the target."""
    write_corpus(stage)
    write_toy(stage.input("sample") / "corpus", CORPUS, 40, 5, 1, labels=[], absent=[])
    for shard, split in enumerate(("train", "val", "test")):
        write_toy(stage.input("ingest") / "images", IMAGES, 60, 20 + shard, 10 + shard, split=split, labels=["Edema"],
                  absent=[])
    seen = {}

    def learn(model, reader, settings, seed, folder):
        seen[folder.uri.rpartition("/")[2]] = reader.n, int(reader.targets.sum()), settings.images

    monkeypatch.setattr(module, "train", learn)
    metrics = finetune(stage)
    assert metrics["target"] == "opacity"
    assert metrics["n"]["real"] == {"images": 260, "positive": 100, "negative": 100, "unknown": 60}
    assert metrics["n"]["test"] == {"images": 120, "positive": 30, "negative": 30, "unknown": 60}
    assert seen == {"real": (200, 100, 800), "synthetic": (100, 50, 800), "mixed": (300, 150, 800)}
    test = list(draw_examples((stage.input("ingest") / "images", "test"), "opacity", None, 1_000, 32, seed=0))
    truth = np.concatenate([targets for _, targets in test])
    assert (len(truth), int(truth.sum())) == (60, 30), "an unlabelled image is no negative"


def test_a_large_part_is_sampled_by_the_seed(stage):
    part = stage.input("ingest") / "images", "train"
    drawn = [image for images, _ in draw_examples(part, "opacity", None, 30, 32, seed=0) for image in images]
    again = [image for images, _ in draw_examples(part, "opacity", None, 30, 32, seed=0) for image in images]
    assert len(drawn) == 30
    assert np.array_equal(drawn, again)


def test_no_more_embeddings_are_held_than_images_are_trained_on(stage, monkeypatch):
    monkeypatch.setattr(examples, "load_encoder", lambda folder: torch.nn.Identity())
    monkeypatch.setattr(examples, "embed", lambda network, images, batch:
                        torch.from_numpy(images).float().mean((1, 2, 3))[:, None])
    write_corpus(stage)
    parts = [(stage.input("ingest") / "images", "train"), (stage.input("sample") / "corpus", None)]
    assert embedding_reader(parts, "opacity", stage.folder, 30, 32, seed=0).inputs.shape == (30, 1)
    whole = embedding_reader(parts, "opacity", stage.folder, 1_000, 32, seed=0)
    assert (whole.n, int(whole.targets.sum())) == (300, 150)


def write_corpus(stage: Stage, n: int = 100) -> None:
    write_toy(stage.input("sample") / "corpus", CORPUS, n, 9)


def test_all_arms_learn_an_easy_target(stage):
    write_corpus(stage)
    metrics = finetune(stage)
    assert metrics["target"] == "opacity"
    assert metrics["n"]["synthetic"] == {"images": 100, "positive": 50, "negative": 50, "unknown": 0}
    assert "skipped" not in metrics
    for arm in ("real", "synthetic", "mixed"):
        assert metrics[arm]["auc"] > 0.9
        assert metrics[arm]["f1"] > 0.8
        assert not (stage.folder / arm).exists(CHECKPOINT)
        assert (stage.folder / arm).read_json(RESULT) == metrics[arm]
        residual_network([8, 16]).load_state_dict(load((stage.folder / arm).read("model.safetensors")))


def test_a_resumed_stage_keeps_the_arms_that_are_done(stage, monkeypatch):
    write_corpus(stage)
    trained = []
    monkeypatch.setattr(module, "train_arm", lambda folder, *rest: trained.append(folder.uri.rpartition("/")[2]) or {})
    done = {"auc": 0.5}
    (stage.folder / "real").write_json(RESULT, done)
    assert finetune(stage)["real"] == done
    assert trained == ["synthetic", "mixed"]


def test_figures_that_cannot_be_known_are_absent(stage, monkeypatch):
    write_corpus(stage, n=1)
    monkeypatch.setattr(module, "train_arm", lambda *work: {"auc": 1.0})
    metrics = finetune(stage)
    assert metrics["skipped"] == "the synthetic corpus has no image with opacity"
    assert "real" in metrics
    assert not {"synthetic", "mixed"} & metrics.keys()


def test_a_narrow_network_has_gradients_on_large_images():
    """With strided 1×1 convolutions, oneDNN ended the process here."""
    model = residual_network([8, 16])
    model(torch.rand(2, 1, 256, 256)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_training_resumes_to_the_same_weights(tmp_path, tiny):
    settings = tiny("finetune.images=96", "finetune.checkpoint_seconds=1e-9").finetune
    images, labels = toy_images(64, 0)
    inputs, targets = np.stack(images)[:, None], np.array([bool(present) for present in labels])

    def run(name: str, stop_after: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = residual_network([8, 16])
        seen = []

        def count_calls(*_) -> None:
            seen.append(1)
            if len(seen) == stop_after:
                raise InterruptedError

        model.register_forward_pre_hook(count_calls)
        train(model, ArrayReader(inputs, targets, 0), settings, 0, Folder(f"{tmp_path}/{name}"))
        return probabilities(model, [(inputs, targets)], 32)[0]

    with pytest.raises(InterruptedError):
        run("cut", stop_after=3)
    torch.testing.assert_close(run("cut"), run("whole"))
