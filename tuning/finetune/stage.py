"""Stage `finetune`: does a classifier learn from the synthetic images what it learns from the real ones?

Three classifiers see equally many images, repeats counted: of the real train split, of the synthetic corpus, of both
together. All are judged on the real test split, at thresholds chosen on the real val split. An image of which it is not
known whether it shows the target takes part in none of this: neither in training nor in thresholds nor in test figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.data.findings import canonical
from pipelines.data.labels import ABSENT, PRESENT, STATES, UNKNOWN, known_labels, label_states
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
NORMAL = re.compile(r"no finding|negative|none|0", re.IGNORECASE)  # beside the spellings that ingest makes one
RESULT = "arm.json"



def finetune(stage: Stage) -> Metrics:
    """Returns AUC, F1 and accuracy of each arm, the counts behind them, and why an arm is `skipped` where one is."""
    settings, images = stage.section(Finetune), stage.input("ingest") / "images"
    parts: dict[str, Part] = {"real": (images, "train"), "synthetic": (stage.input("sample") / "corpus", None),
                              "val": (images, "val"), "test": (images, "test")}
    labels = {name: read_columns(folder, STATES, split) for name, (folder, split) in parts.items()}
    metrics: Metrics = {"backbone": settings.backbone}
    target = choose_target(labels["real"], settings.target)
    if target is None:
        return metrics | _skip([no_target(labels["real"], settings.target)])
    counts = {name: count(found, target) for name, found in labels.items()}
    metrics |= {"target": target, "n": counts}
    obstacles = {arm: [why for name in (*sources, "test") if (why := one_class(name, counts[name], target))]
                 for arm, sources in ARMS.items()}
    fewest = min(counts[name]["positive"] + counts[name]["negative"] for name in ("real", "synthetic"))
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


def choose_target(labels: pa.Table, wanted: str | None) -> str | None:
    """The finding to learn: the `wanted` one, in any of its spellings, else one named like an opacity, else the most
    frequent abnormal one; of these one that is also known to be absent somewhere, if there is any.

    Returns:
        None where no image has such a label.
    """
    present, absent = (_frequency(labels[name]) for name in STATES)
    if wanted is not None:
        return next((name for name in (wanted, *canonical(wanted, "")) if name in present), None)
    abnormal = [name for name in present if not NORMAL.fullmatch(name.strip())]
    learnable = [name for name in abnormal if name in absent] or abnormal
    return next((name for name in learnable if OPACITY.search(name)), next(iter(learnable), None))


def _frequency(column: pa.ChunkedArray) -> dict[str, int]:
    """Images of each finding, the most frequent first."""
    counts = {row["values"]: row["counts"] for row in pc.value_counts(pc.list_flatten(column)).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def no_target(labels: pa.Table, wanted: str | None) -> str:
    """In words, why `choose_target` found none."""
    known = ", ".join(known_labels(labels))
    if not known:
        return "the train split has no labels"
    return f"finetune.target={wanted} is not among the labels ({known})" if wanted else f"no label but {known}"


def count(labels: pa.Table, target: str) -> dict[str, int]:
    """Images in all, and by the state of the target."""
    states = label_states(labels, [target])
    return {"images": len(states), **{name: int((states == state).sum()) for name, state in (
        ("positive", PRESENT), ("negative", ABSENT), ("unknown", UNKNOWN))}}


def one_class(name: str, counts: dict[str, int], target: str) -> str | None:
    """In words, the class that the part `name` lacks, if it lacks one."""
    for lacking, state in (("with", "positive"), ("known to be without", "negative")):
        if counts[state] == 0:
            return f"{NAMES[name]} has no image {lacking} {target}"
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
    states = np.concatenate([states_of(part, target) for part in sources])
    known = states != UNKNOWN
    targets = states[known] == PRESENT
    if encoder is None:
        reader: Reader = ImageReader(sources, seed, targets, known)
        return reader, residual_network(settings.channels).to(device())
    embeddings = np.concatenate([chunk for part in sources
                                 for chunk in inputs_of(part, target, encoder, settings.batch)])
    return ArrayReader(embeddings, targets, seed), embedding_head(embeddings.shape[1]).to(device())


def load_examples(part: Part, target: str, encoder: Folder | None, batch: int) -> Examples:
    states = states_of(part, target)
    return Examples(inputs_of(part, target, encoder, batch), states[states != UNKNOWN] == PRESENT)


def states_of(part: Part, target: str) -> np.ndarray:
    """State of the target in every image of a part, int8 (N,): 1, 0, or -1 where it is unknown."""
    return label_states(read_columns(part[0], STATES, part[1]), [target])[:, 0]


def inputs_of(part: Part, target: str, encoder: Folder | None, batch: int) -> Iterator[np.ndarray]:
    """The images of a part whose target is known, or their embeddings where there is an encoder; a shard at a time."""
    network = None if encoder is None else load_encoder(encoder).to(device())
    for shard in iterate_shards(part[0], ["image", *STATES], part[1]):
        known = shard.filter(pa.array(label_states(shard, [target])[:, 0] != UNKNOWN))
        if known.num_rows:
            images = pixels(known)
            yield images if network is None else embed(network, images, batch).numpy()
