"""Stage `finetune`: compares classifiers trained on real, synthetic and mixed images.

The three classifiers see the same number of images, repeats counted: of the real train split, of the synthetic corpus,
and of both together. All are evaluated on the real test split, at thresholds chosen on the real val split. Images whose
state of the target is unknown are not used, neither for training nor for thresholds nor for testing.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import run_on_accelerator
from pipelines.data.findings import canonical
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.readers import Part, Reader
from pipelines.learning.small_loop import CHECKPOINT
from pipelines.monitor.progress import follow, say
from tuning.finetune.classify import embedding_head, evaluate_classifier, residual_network, save_weights, train
from tuning.finetune.examples import (
    Examples,
    count,
    count_findings,
    draw_examples,
    embedding_reader,
    image_reader,
    label_tables,
    target_states,
)
from tuning.settings import FinetuneSettings

ARMS = {"real": ("real",), "synthetic": ("synthetic",), "mixed": ("real", "synthetic")}
NAMES = {"real": "the train split", "synthetic": "the synthetic corpus", "test": "the test split"}
OPACITY = re.compile(r"pneumon|opaci|infiltrat|consolidat|covid|tubercul", re.IGNORECASE)
NORMAL = re.compile(r"no finding|negative|none|0", re.IGNORECASE)  # in addition to the spellings that ingest unifies
RESULT = "arm.json"


def finetune(stage: Stage) -> Metrics:
    """Returns AUC, F1 and accuracy of each arm, the numbers of images, and in `skipped` why arms are missing."""
    settings, images = stage.section(FinetuneSettings), stage.input("ingest") / "images"
    tables: dict[str, Part] = {"real": (images, "train"), "synthetic": (stage.input("sample") / "corpus", None),
                              "val": (images, "val"), "test": (images, "test")}
    metrics: Metrics = {"backbone": settings.backbone}
    metrics |= run_on_accelerator(stage.resources, survey, tables, settings.target)
    if "target" not in metrics:
        return metrics
    target, counts = metrics["target"], metrics["n"]
    obstacles = {arm: [reason for name in (*sources, "test")
                       if (reason := missing_class(name, counts[name], target))]
                 for arm, sources in ARMS.items()}
    fewest = min(counts[name]["positive"] + counts[name]["negative"] for name in ("real", "synthetic"))
    settings = replace(settings, images=settings.training_images(fewest))
    encoder = stage.input("encoder") if settings.backbone == "encoder" else None
    for arm, sources in ARMS.items():
        if obstacles[arm]:
            continue
        folder = stage.folder / arm
        arguments = (folder, [tables[name] for name in sources], tables["val"], tables["test"], target, settings,
                     encoder, stage.seed)
        metrics[arm] = folder.read_json(RESULT) or _follow(stage, arm, settings.images, arguments)
    return metrics | _skipped([reason for arm in ARMS for reason in obstacles[arm]])


def _follow(stage: Stage, arm: str, total: int, arguments: tuple) -> Metrics:
    with follow(stage.folder / arm, f"finetune {arm}", total):
        return run_on_accelerator(stage.resources, train_arm, *arguments)


def _skipped(reasons: list[str]) -> Metrics:
    """Print why arms are skipped, and return the reasons as the metric `skipped`."""
    if not reasons:
        return {}
    text = "; ".join(dict.fromkeys(reasons))
    say(f"finetune: skipped: {text}")
    return {"skipped": text}


def survey(tables: dict[str, Part], requested: str | None) -> Metrics:
    """The target and, for each table, the number of images by its state; or why there is no target."""
    present, absent = count_findings(label_tables(tables["real"]))
    target = choose_target(present, absent, requested)
    if target is None:
        return _skipped([no_target(present, requested)])
    return {"target": target, "n": {name: count(target_states(part, target)) for name, part in tables.items()}}


def choose_target(present: Counter[str], absent: Counter[str], requested: str | None) -> str | None:
    """The finding to classify: the `requested` one, in any spelling; else one with a name like an opacity; else the
    most frequent abnormal one. Findings that are known to be absent in some images are preferred.

    Args:
        present: number of images in which each finding is present.
        absent: number of images in which each finding is absent.

    Returns:
        None if no image has such a label.
    """
    if requested is not None:
        return next((name for name in (requested, *canonical(requested, "")) if name in present), None)
    frequent = sorted(present, key=lambda name: (-present[name], name))
    abnormal = [name for name in frequent if not NORMAL.fullmatch(name.strip())]
    learnable = [name for name in abnormal if name in absent] or abnormal
    return next((name for name in learnable if OPACITY.search(name)), next(iter(learnable), None))


def no_target(present: Counter[str], requested: str | None) -> str:
    """Why `choose_target` found no target."""
    labels = ", ".join(sorted(present))
    if not labels:
        return "the train split has no labels"
    if requested:
        return f"finetune.target={requested} is not among the labels ({labels})"
    return f"all labels mean \"normal\" ({labels}): nothing to classify"


def missing_class(name: str, counts: dict[str, int], target: str) -> str | None:
    """Which class the table `name` lacks, in words; None if it has both."""
    for lacking, state in (("with", "positive"), ("known to be without", "negative")):
        if counts[state] == 0:
            return f"{NAMES[name]} has no image {lacking} {target}"
    return None


def train_arm(folder: Folder, sources: list[Part], val: Part, test: Part, target: str, settings: FinetuneSettings,
          encoder: Folder | None, seed: int) -> Metrics:
    """Train and evaluate one arm; its result is written last and marks the arm as done."""
    torch.manual_seed(seed)
    reader, model = reader_and_model(sources, target, settings, encoder, seed)
    train(model, reader, settings, seed, folder)

    def held_out(part: Part) -> Examples:
        return draw_examples(part, target, encoder, settings.eval_images, settings.batch, seed)

    metrics = evaluate_classifier(model, held_out(val), held_out(test), settings.batch)
    save_weights(folder, model, target=target, backbone=settings.backbone, channels=str(settings.channels))
    folder.write_json(RESULT, metrics)
    folder.remove(CHECKPOINT)
    return metrics


def reader_and_model(sources: list[Part], target: str, settings: FinetuneSettings, encoder: Folder | None,
            seed: int) -> tuple[Reader, nn.Module]:
    """The reader of images, or of their embeddings, and the network to train."""
    if encoder is None:
        return image_reader(sources, target, seed), residual_network(settings.channels).to(device())
    reader = embedding_reader(sources, target, encoder, settings.images, settings.batch, seed)
    return reader, embedding_head(reader.inputs.shape[1]).to(device())
