"""Stage `finetune`: does a classifier learn from the synthetic images what it learns from the real ones?

Three classifiers see equally many images, repeats counted: of the real train split, of the synthetic corpus, of both
together. All are judged on the real test split, at thresholds chosen on the real val split. An image without the target
label counts as negative.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.generator.encoder.vit import embed, load_encoder
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.readers import ArrayReader, ImageReader, Part, Reader
from pipelines.learning.small_loop import CHECKPOINT
from pipelines.monitor.progress import follow, say
from pipelines.tables.images import pixels
from pipelines.tables.parquet import iterate_shards, read_columns
from tuning.finetune.classify import Examples, embedding_head, judge, residual_network, save_weights, train
from tuning.settings import Finetune

ARMS = {"real": ("real",), "synthetic": ("synthetic",), "mixed": ("real", "synthetic")}
NAMES = {"real": "the train split", "synthetic": "the synthetic corpus", "test": "the test split"}
OPACITY = re.compile(r"pneumon|opaci|infiltrat|consolidat|covid|tubercul", re.IGNORECASE)
NORMAL = re.compile(r"normal|no[ _-]?findings?|healthy|negative|none|0", re.IGNORECASE)
RESULT = "arm.json"

Labels = Sequence[Sequence[str]]  # of every image


def finetune(stage: Stage) -> Metrics:
    """Returns AUC, F1 and accuracy of each arm, the counts behind them, and why an arm is `skipped` where one is."""
    settings, images = stage.section(Finetune), stage.input("ingest") / "images"
    parts: dict[str, Part] = {"real": (images, "train"), "synthetic": (stage.input("sample") / "corpus", None),
                              "val": (images, "val"), "test": (images, "test")}
    labels = {name: read_columns(folder, ["labels"], split)["labels"].to_pylist()
              for name, (folder, split) in parts.items()}
    metrics: Metrics = {"backbone": settings.backbone}
    target = choose_target(labels["real"], settings.target)
    if target is None:
        return metrics | _skip([no_target(labels["real"], settings.target)])
    counts = {name: count(found, target) for name, found in labels.items()}
    metrics |= {"target": target, "n": counts}
    obstacles = {arm: [why for name in (*sources, "test") if (why := one_class(name, counts[name], target))]
                 for arm, sources in ARMS.items()}
    fewest = min(counts[name]["images"] for name in ("real", "synthetic"))
    settings = replace(settings, images=settings.total(fewest))
    encoder = stage.input("encoder") if settings.backbone == "encoder" else None
    for arm, sources in ARMS.items():
        if obstacles[arm]:
            continue
        folder = stage.folder / arm
        work = (folder, [parts[name] for name in sources], parts["val"], parts["test"], target, settings, encoder,
                stage.seed)
        metrics[arm] = folder.read_json(RESULT) or _follow(stage, arm, settings.images, work)
    return metrics | _skip([why for arm in ARMS for why in obstacles[arm]])


def _follow(stage: Stage, arm: str, total: int, work: tuple) -> Metrics:
    with follow(stage.folder / arm, f"finetune {arm}", total):
        return compute(stage.resources, train_arm, *work)


def _skip(reasons: list[str]) -> Metrics:
    """Tell the user why something is left out, and the report in `skipped`."""
    if not reasons:
        return {}
    text = "; ".join(dict.fromkeys(reasons))
    say(f"finetune: left out: {text}")
    return {"skipped": text}


def choose_target(labels: Labels, wanted: str | None) -> str | None:
    """The label to learn: the `wanted` one, else one named like an opacity, else the most frequent abnormal one.

    Returns:
        None where no image has such a label.
    """
    frequency = Counter(label for present in labels for label in present)
    by_frequency = sorted(frequency, key=lambda label: (-frequency[label], label))
    if wanted is not None:
        return wanted if wanted in frequency else None
    abnormal = [label for label in by_frequency if not NORMAL.fullmatch(label.strip())]
    return next((label for label in abnormal if OPACITY.search(label)), next(iter(abnormal), None))


def no_target(labels: Labels, wanted: str | None) -> str:
    """In words, why `choose_target` found none."""
    known = ", ".join(sorted({label for present in labels for label in present}))
    if not known:
        return "the train split has no labels"
    return f"finetune.target={wanted} is not among the labels ({known})" if wanted else f"no label but {known}"


def count(labels: Labels, target: str) -> dict[str, int]:
    return {"images": len(labels), "positive": sum(target in present for present in labels)}


def one_class(name: str, counts: dict[str, int], target: str) -> str | None:
    """In words, the class that the part `name` lacks, if it lacks one."""
    for missing, lacks in (("with", counts["positive"] == 0), ("without", counts["positive"] == counts["images"])):
        if lacks:
            return f"{NAMES[name]} has no image {missing} {target}"
    return None


def train_arm(folder: Folder, sources: list[Part], val: Part, test: Part, target: str, settings: Finetune,
          encoder: Folder | None, seed: int) -> Metrics:
    """Train and judge one arm; its result is committed last, so that a resumed stage knows the arm is done."""
    torch.manual_seed(seed)
    reader, model = learner(sources, target, settings, encoder, seed)
    train(model, reader, settings, seed, folder)
    metrics = judge(model, load_examples(val, target, encoder, settings.batch),
                    load_examples(test, target, encoder, settings.batch), settings.batch)
    save_weights(folder, model, target=target, backbone=settings.backbone, channels=str(settings.channels))
    folder.write_json(RESULT, metrics)
    folder.remove(CHECKPOINT)
    return metrics


def learner(sources: list[Part], target: str, settings: Finetune, encoder: Folder | None,
            seed: int) -> tuple[Reader, nn.Module]:
    """What to learn from, images as they are read or all their embeddings, and the network for it."""
    targets = np.concatenate([targets_of(part, target) for part in sources])
    if encoder is None:
        reader: Reader = ImageReader(sources, seed, targets)
        return reader, residual_network(settings.channels).to(device())
    embeddings = np.concatenate([chunk for part in sources for chunk in inputs_of(part, encoder, settings.batch)])
    return ArrayReader(embeddings, targets, seed), embedding_head(embeddings.shape[1]).to(device())


def load_examples(part: Part, target: str, encoder: Folder | None, batch: int) -> Examples:
    return Examples(inputs_of(part, encoder, batch), targets_of(part, target))


def targets_of(part: Part, target: str) -> np.ndarray:
    """Whether each image of a part shows the target, bool (N,)."""
    labels = read_columns(part[0], ["labels"], part[1])["labels"].to_pylist()
    return np.array([target in present for present in labels], bool)


def inputs_of(part: Part, encoder: Folder | None, batch: int) -> Iterator[np.ndarray]:
    """The images of a part, or their embeddings where there is an encoder; one shard in memory at a time."""
    network = None if encoder is None else load_encoder(encoder).to(device())
    for shard in iterate_shards(part[0], ["image"], part[1]):
        if shard.num_rows:
            images = pixels(shard)
            yield images if network is None else embed(network, images, batch).numpy()
