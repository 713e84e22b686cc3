"""Stage `train`: from cached latents to an exported generator."""

from __future__ import annotations

from typing import Any

import torch

from cluster.storage import Folder
from pipelines.generator.export import export
from pipelines.generator.latents.spec import latent_spec
from pipelines.generator.settings import TrainerSettings
from pipelines.generator.training import checkpoint, validate
from pipelines.generator.training.loop import Job
from pipelines.generator.training.ray_train import _fit, _name, stream_plan
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.journal import JOURNAL, read_journal
from pipelines.monitor.progress import follow, say


def train(stage: Stage) -> Metrics:
    """Returns images seen, loss, images/s, the share of time spent waiting for data, and the EMA's distance.

    Raises:
        UserError: more workers are asked for than the cluster has room for, or the settings do not fit the latents.
        FloatingPointError: the loss was no finite number in too many batches.
    """
    from pipelines.generator.autoencoder.model import load_autoencoder

    config = load_autoencoder(stage.input("autoencoder")).config
    spec = latent_spec(stage.input("latents"))
    job = Job(stage.settings, stage.fingerprint, stage.folder, stage.input("latents"), stream_plan(stage, spec),
              list(config.latents_mean), list(config.latents_std))
    with torch.device("meta"):
        job.denoiser(spec)  # a network that does not fit the latents is told before workers start
    trainer, begun = stage.settings.trainer, checkpoint.newest_whole(stage.folder / "checkpoints")
    since = 0
    if begun:
        cursor = checkpoint.cursor_of(begun)
        since = cursor.images
        say(f"train: goes on from {since:,} of {trainer.images:,} images, after {cursor.steps:,} steps ({begun.uri})")
    with follow(stage.folder, "train", trainer.images, JOURNALS, trainer.loggers, since):
        last = _fit(job, stage)
    chosen = best_checkpoint(stage.folder, trainer) or last
    images = checkpoint.images_of(_name(chosen))
    ema, held_out = best_average(trainer, validate.of(stage.folder, images))
    parameters = export(job, chosen, ema, stage.input("autoencoder"), stage.input("encoder"))
    return summarise(read_journal(stage.folder)) | held_out | {
        "parameters": parameters, "exported": f"{ema} at {images:,} images"}


def best_checkpoint(folder: Folder, trainer: TrainerSettings) -> Folder | None:
    """The checkpoint with the least of what `trainer.select_by` names among those kept; None where it names nothing."""
    kept = {checkpoint.images_of(name) for name in (folder / "checkpoints").names()
            if name.startswith(checkpoint.PREFIX)}
    known = [(entry[trainer.select_by], entry["images"]) for entry in read_journal(folder, validate.FILE)
             if trainer.select_by in entry and entry["images"] in kept]
    return folder / "checkpoints" / checkpoint.name(min(known)[1]) if known else None


def best_average(trainer: TrainerSettings, measured: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Which average of the weights to export, and what is known of it.

    It is the one with the least validation loss; the first where none was measured, or where the Fréchet distance
    chose, which is the first's.
    """
    losses = {average: measured.get(name) for average, name in validate.loss_names(trainer).items()}
    first = next(iter(losses))
    best = first if trainer.select_by == "val_frechet" else min(losses, key=lambda average: losses[average] or 0.0)
    known = {"val_loss": losses[best], "val_frechet": measured.get("val_frechet") if best == first else None}
    return best, {name: value for name, value in known.items() if value is not None}


def summarise(entries: list[dict[str, Any]]) -> Metrics:
    """Figures of a whole training from its journal: the median rate, and the mean of the last tenth of the losses."""
    rates = sorted(entry["images_per_second"] for entry in entries)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    tail = losses[-max(len(losses) // 10, 1) :]
    waits = [entry["data_wait_fraction"] for entry in entries]
    last = entries[-1]
    return {
        "images": last["images"],
        "loss": round(sum(tail) / max(len(tail), 1), 6),
        "images_per_second": rates[len(rates) // 2],
        "data_wait_fraction": round(sum(waits) / len(waits), 5),
        "ema_distance": last.get("ema_distance"),
        "skipped_batches": last["skipped"],
        **({"mfu": last["mfu"]} if "mfu" in last else {}),
    }


JOURNALS = (JOURNAL, validate.FILE)
