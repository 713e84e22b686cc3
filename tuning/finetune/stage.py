"""Stage `finetune`: does a classifier learn from the synthetic images what it learns from the real ones?

Three classifiers see equally many images, repeats counted: of the real train split, of the synthetic corpus, of both
together. All are judged on the real test split, at thresholds chosen on the real val split. An image of which it is not
known whether it shows the target takes part in none of this: neither in training nor in thresholds nor in test figures.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from cluster.session import device
from cluster.storage import Folder
from cluster.tasks import compute
from pipelines.data.findings import canonical
from pipelines.graph.stage import Metrics, Stage
from pipelines.learning.readers import Part, Reader
from pipelines.learning.small_loop import CHECKPOINT
from pipelines.monitor.progress import follow, say
from tuning.finetune.classify import embedding_head, judge, residual_network, save_weights, train
from tuning.finetune.examples import (
    Examples,
    count,
    draw_examples,
    embedding_reader,
    frequencies,
    image_reader,
    label_tables,
    target_states,
)
from tuning.settings import FinetuneSettings

ARMS = {"real": ("real",), "synthetic": ("synthetic",), "mixed": ("real", "synthetic")}
NAMES = {"real": "the train split", "synthetic": "the synthetic corpus", "test": "the test split"}
OPACITY = re.compile(r"pneumon|opaci|infiltrat|consolidat|covid|tubercul", re.IGNORECASE)
NORMAL = re.compile(r"no finding|negative|none|0", re.IGNORECASE)  # beside the spellings that ingest makes one
RESULT = "arm.json"


def finetune(stage: Stage) -> Metrics:
    """Returns AUC, F1 and accuracy of each arm, the counts behind them, and why an arm is `skipped` where one is."""
    settings, images = stage.section(FinetuneSettings), stage.input("ingest") / "images"
    parts: dict[str, Part] = {"real": (images, "train"), "synthetic": (stage.input("sample") / "corpus", None),
                              "val": (images, "val"), "test": (images, "test")}
    metrics: Metrics = {"backbone": settings.backbone} | compute(stage.resources, survey, parts, settings.target)
    if "target" not in metrics:
        return metrics
    target, counts = metrics["target"], metrics["n"]
    obstacles = {arm: [why for name in (*sources, "test") if (why := one_class(name, counts[name], target))]
                 for arm, sources in ARMS.items()}
    fewest = min(counts[name]["positive"] + counts[name]["negative"] for name in ("real", "synthetic"))
    settings = replace(settings, images=settings.training_images(fewest))
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


def survey(parts: dict[str, Part], wanted: str | None) -> Metrics:
    """The target and, for each part, the images in each of its states; or why there is no target."""
    present, absent = frequencies(label_tables(parts["real"]))
    target = choose_target(present, absent, wanted)
    if target is None:
        return _skip([no_target(present, wanted)])
    return {"target": target, "n": {name: count(target_states(part, target)) for name, part in parts.items()}}


def choose_target(present: Counter[str], absent: Counter[str], wanted: str | None) -> str | None:
    """The finding to learn: the `wanted` one, in any of its spellings, else one named like an opacity, else the most
    frequent abnormal one; of these one that is also known to be absent somewhere, if there is any.

    Args:
        present: images in which a finding is present.
        absent: images in which it is absent.

    Returns:
        None where no image has such a label.
    """
    if wanted is not None:
        return next((name for name in (wanted, *canonical(wanted, "")) if name in present), None)
    frequent = sorted(present, key=lambda name: (-present[name], name))
    abnormal = [name for name in frequent if not NORMAL.fullmatch(name.strip())]
    learnable = [name for name in abnormal if name in absent] or abnormal
    return next((name for name in learnable if OPACITY.search(name)), next(iter(learnable), None))


def no_target(present: Counter[str], wanted: str | None) -> str:
    """In words, why `choose_target` found none."""
    known = ", ".join(sorted(present))
    if not known:
        return "the train split has no labels"
    return f"finetune.target={wanted} is not among the labels ({known})" if wanted else f"no label but {known}"


def one_class(name: str, counts: dict[str, int], target: str) -> str | None:
    """In words, the class that the part `name` lacks, if it lacks one."""
    for lacking, state in (("with", "positive"), ("known to be without", "negative")):
        if counts[state] == 0:
            return f"{NAMES[name]} has no image {lacking} {target}"
    return None


def train_arm(folder: Folder, sources: list[Part], val: Part, test: Part, target: str, settings: FinetuneSettings,
          encoder: Folder | None, seed: int) -> Metrics:
    """Train and judge one arm; its result is committed last, so that a resumed stage knows the arm is done."""
    torch.manual_seed(seed)
    reader, model = learner(sources, target, settings, encoder, seed)
    train(model, reader, settings, seed, folder)

    def held_out(part: Part) -> Examples:
        return draw_examples(part, target, encoder, settings.eval_images, settings.batch, seed)

    metrics = judge(model, held_out(val), held_out(test), settings.batch)
    save_weights(folder, model, target=target, backbone=settings.backbone, channels=str(settings.channels))
    folder.write_json(RESULT, metrics)
    folder.remove(CHECKPOINT)
    return metrics


def learner(sources: list[Part], target: str, settings: FinetuneSettings, encoder: Folder | None,
            seed: int) -> tuple[Reader, nn.Module]:
    """What to learn from, images or their embeddings, and the network for it."""
    if encoder is None:
        return image_reader(sources, target, seed), residual_network(settings.channels).to(device())
    reader = embedding_reader(sources, target, encoder, settings.images, settings.batch, seed)
    return reader, embedding_head(reader.inputs.shape[1]).to(device())
