"""Stage `train`: from cached latents to an exported generator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cluster.storage import Folder
from cluster.tasks import run_on_accelerator
from pipelines.generator.denoiser.pretrained import load_pretrained, published_config
from pipelines.generator.latents.spec import read_latent_spec
from pipelines.generator.training import checkpoint, validate
from pipelines.generator.training.average import TrainedModel, choose_length
from pipelines.generator.training.checkpoint import Cursor, Layout
from pipelines.generator.training.loop import TrainingSpec
from pipelines.generator.training.placement import stream_plan, training_resources
from pipelines.generator.training.ray_train import run_trainer
from pipelines.generator.training.settings import TrainerSettings
from pipelines.generator.training.sharded_state import flattened, fragments
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.journal import JOURNAL, median_rate, read_journal
from pipelines.monitor.progress import follow, say

JOURNALS = (JOURNAL, validate.FILE)
PUBLISHED = "pretrained.json"


def train(stage: Stage) -> Metrics:
    """Returns images seen, loss, images/s, the fraction of time spent waiting for data, and the EMA's distance.

    Raises:
        UserError: the cluster has no room for the requested workers, or the settings do not fit the latents.
        FloatingPointError: too many batches had a non-finite loss.
    """
    trainer = stage.settings.trainer
    stage = replace(stage, resources=training_resources(trainer, stage.resources))
    spec, latent_spec = training_spec(stage), read_latent_spec(stage.input("latents"))
    with torch.device("meta"):
        spec.denoiser(latent_spec)  # raises if the network does not fit the latents, before any worker starts
    since = 0
    if latest := checkpoint.latest_complete(stage.folder / "checkpoints"):
        cursor = checkpoint.read_cursor(latest)
        since = cursor.images
        say(f"train: resuming at {since:,} of {trainer.images:,} images, after {cursor.steps:,} steps ({latest.uri})")
    with follow(stage.folder, "train", trainer.images, JOURNALS, trainer.loggers, since):
        last = run_trainer(spec, stage)
    model = TrainedModel(spec, best_checkpoint(stage.folder, trainer) or last, stage.input("autoencoder"),
                         stage.input("encoder"))
    length, measured = choose_length(model, stage.resources)
    parameters = run_on_accelerator(stage.resources, model.export, length)
    by_length = {f"{each:g}": found["val_frechet"] for each, found in sorted(measured.items())
                 if "val_frechet" in found}
    return summarise(read_journal(stage.folder)) | measured.get(length, {}) | {
        "parameters": parameters, "exported_images": checkpoint.images_seen(model.selected), "ema_length": length,
        "ema_profile_error": round(model.profile_error(length), 4),
        **({"val_frechet_by_length": by_length} if by_length else {})}


def training_spec(stage: Stage) -> TrainingSpec:
    """The parameters of the workers; a published UNet is read once, and kept in start/ and pretrained.json."""
    settings, latents = stage.settings, stage.input("latents")
    autoencoder = (stage.input("autoencoder") / "model").read_json("config.json")
    assert autoencoder is not None, "a finished autoencoder has its config"
    spec = TrainingSpec(settings, stage.fingerprint, stage.folder, latents,
                        stream_plan(stage, read_latent_spec(latents)), autoencoder["latents_mean"],
                        autoencoder["latents_std"])
    if not settings.denoiser.pretrained:
        return spec
    if (kept := stage.folder.read_json(PUBLISHED)) is not None:
        return replace(spec, published=kept)
    published = published_config(settings.denoiser.pretrained)
    spec = replace(spec, published=published)
    run_on_accelerator(stage.resources, write_start, spec)
    stage.folder.write_json(PUBLISHED, published)
    return spec


def write_start(spec: TrainingSpec) -> None:
    """Write the float32 weights that training starts from, a published UNet's, as a checkpoint without other parts."""
    denoiser = spec.denoiser(read_latent_spec(spec.latents))
    load_pretrained(denoiser.network, spec.settings.denoiser.pretrained)
    named = list(denoiser.named_parameters())
    parameters = [parameter.detach() for _, parameter in named]
    layout = Layout([checkpoint.MODEL], {name: list(parameter.shape) for name, parameter in named},
                    [fragments(0, 0, named, parameters)])
    weights = flattened(parameters, torch.empty(sum(parameter.numel() for parameter in parameters)))
    checkpoint.write_vectors(spec.start, layout, 0, {checkpoint.MODEL: weights})
    checkpoint.write_state(spec.start, layout, Cursor(0, 0, spec.fingerprint))


def best_checkpoint(folder: Folder, trainer: TrainerSettings) -> Folder | None:
    """The kept checkpoint with the lowest value of the metric `trainer.select_by`; None if it is null."""
    kept = set(map(checkpoint.images_seen, checkpoint.list_checkpoints(folder / "checkpoints")))
    scored = [(entry[trainer.select_by], entry["images"]) for entry in read_journal(folder, validate.FILE)
              if trainer.select_by in entry and entry["images"] in kept]
    return folder / "checkpoints" / checkpoint.directory_name(min(scored)[1]) if scored else None


def summarise(entries: list[dict[str, Any]]) -> Metrics:
    """Metrics of a training run from its journal: the median rate, the mean of the last tenth of the losses, …"""
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    tail = losses[-max(len(losses) // 10, 1) :]
    waits = [entry["data_wait_fraction"] for entry in entries]
    last = entries[-1]
    return {
        "images": last["images"],
        "loss": round(sum(tail) / max(len(tail), 1), 6),
        "images_per_second": median_rate(entries),
        "data_wait_fraction": round(sum(waits) / len(waits), 5),
        "ema_distance": last.get("ema_distance"),
        "skipped_batches": last["skipped"],
        **({"mfu": last["mfu"]} if "mfu" in last else {}),
    }
