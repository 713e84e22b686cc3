"""Figures of a run, by stage: metrics.json, the table shown at the end, and the rows of the report's tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.settings import Settings
from pipelines.stage import run_folder

Figures = Mapping[str, Any]

FIGURES = {  # per stage, the figures that sum it up; one whose value is not known is left out
    "ingest": ("{images:,} images", "{quarantined:,} in quarantine", "{images_per_second:,.0f} images/s"),
    "autoencoder": ("PSNR {psnr:.1f} dB",),
    "encoder": ("{dim}-d", "effective rank {effective_rank:.1f}", "k-NN AUC {knn_auc:.3f}"),
    "latents": ("{images:,} images", "{images_per_second:,.0f} images/s"),
    "train": ("{images:,} images", "loss {loss:.4g}", "held out {val_loss:.4g}", "{images_per_second:,.0f} images/s",
              "MFU {mfu:.0%}", "waits for data {data_wait_fraction:.1%}"),
    "sample": ("{images:,} images", "{images_per_second:,.3g} images/s"),
    "evaluate": ("Fréchet {frechet:.3g} (floor {frechet_floor:.3g})",
                 "coverage {coverage:.2f} (floor {coverage_floor:.2f})",
                 "copies {copies:.1%} (floor {copies_floor:.1%})"),
    "finetune": ("AUC real {real[auc]:.3f}", "AUC synthetic {synthetic[auc]:.3f}", "AUC mixed {mixed[auc]:.3f}"),
    "report": ("{pictures} pictures", "{bytes:,} bytes"),
}

EVALUATION = (  # figure, its floor, format, name, which way is better, meaning
    ("frechet", "frechet_floor", ".3g", "Fréchet distance", "lower",
     "Squared distance between Gaussians fitted to the features of the two sets; 0 when they are equal."),
    ("precision", "precision_floor", ".3f", "Precision", "higher",
     "Share of synthetic images that lie among the real ones: fidelity."),
    ("recall", "recall_floor", ".3f", "Recall", "higher",
     "Share of real images that lie among the synthetic ones: diversity."),
    ("density", "density_floor", ".3f", "Density", "higher",
     "How many real neighbourhoods hold a synthetic image, over those expected; about 1 for real images."),
    ("coverage", "coverage_floor", ".3f", "Coverage", "higher",
     "Share of real images with a synthetic one in their neighbourhood."),
    ("ms_ssim", "ms_ssim_floor", ".3f", "MS-SSIM within the set", "near the floor",
     "Structural similarity of random pairs; far above the floor the images are too much alike (mode collapse)."),
    ("nearest_median", "nearest_floor_median", ".3g", "Distance to the nearest training image, median",
     "near the floor", "In feature units; far below the floor the generator repeats its training set."),
    ("copies", "copies_floor", ".1%", "Unusually close to a training image", "near the floor",
     "Share of synthetic images nearer to a training image than 99% of the real test images are."),
)

ARMS = {"real": "real images", "synthetic": "synthetic images", "mixed": "both"}
SCORES = ("auc", "f1", "accuracy")


def collect(settings: Settings) -> dict[str, dict[str, Any]]:
    """Metrics of all finished stages.  What is not known is absent."""
    records = {stage: (run_folder(settings) / stage).read_json("stage.json") for stage in settings.graph}
    return {stage: record["metrics"] for stage, record in records.items() if record}


def write_metrics(settings: Settings) -> None:
    (run_folder(settings) / "report").write_json("metrics.json", collect(settings))


def figures_of(stage: str, metrics: Figures) -> str:
    """The figures that sum a stage up, in words."""
    shown = []
    for figure in FIGURES.get(stage, ()):
        with contextlib.suppress(KeyError):
            shown.append(figure.format_map(metrics))
    return ", ".join(shown)


def summary(settings: Settings) -> str:
    """The run's figures as a table for the terminal."""
    rows = [("stage", "seconds", "peak MiB", "figures")]
    rows += [(stage, f"{metrics['seconds']:,.1f}", f"{metrics['peak_rss_mb']:,.0f}", figures_of(stage, metrics))
             for stage, metrics in collect(settings).items()]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = [f"{stage:<{widths[0]}}  {seconds:>{widths[1]}}  {peak:>{widths[2]}}  {shown}".rstrip()
             for stage, seconds, peak, shown in rows]
    report = run_folder(settings) / "report"
    return "\n".join([*lines, "", f"report: {report.uri}/index.html"])


def evaluation(metrics: Figures) -> list[dict[str, str]]:
    """Rows of the evaluation table, of the figures that were measured."""
    return [{"name": name, "value": format(metrics[key], shape), "floor": format(metrics[floor], shape),
             "better": better, "meaning": meaning}
            for key, floor, shape, name, better, meaning in EVALUATION if key in metrics]


def finetuning(metrics: Figures) -> list[dict[str, str]]:
    """Rows of the classifiers' table; empty where none was trained."""
    return [{"arm": label} | {score: f"{metrics[arm][score]:.3f}" if score in metrics[arm] else "" for score in SCORES}
            for arm, label in ARMS.items() if metrics.get(arm)]


def headline(metrics: Mapping[str, Figures]) -> list[dict[str, str]]:
    """The figures at the head of the page, of those that are known: value, name, and what to hold it against."""
    tiles = []

    def tile(value: str, name: str, beside: str = "") -> None:
        tiles.append({"value": value, "name": name, "beside": beside})

    ingest, evaluate, finetune = (metrics.get(stage, {}) for stage in ("ingest", "evaluate", "finetune"))
    if "images" in ingest:
        tile(f"{ingest['images']:,}", "real images", f"{ingest['quarantined']:,} in quarantine")
    if "images" in metrics.get("sample", {}):
        tile(f"{metrics['sample']['images']:,}", "synthetic images")
    if "psnr" in metrics.get("autoencoder", {}):
        tile(f"{metrics['autoencoder']['psnr']:.1f} dB", "autoencoder PSNR", "on the test split")
    for key, name, shape in (("frechet", "Fréchet distance", ".3g"), ("coverage", "coverage", ".2f"),
                             ("copies", "unusually close to train", ".1%")):
        if key in evaluate:
            tile(format(evaluate[key], shape), name, f"real to real {evaluate[f'{key}_floor']:{shape}}")
    for arm, name in (("synthetic", "AUC trained on synthetic"), ("mixed", "AUC trained on both")):
        if "auc" in finetune.get(arm, {}) and "auc" in finetune.get("real", {}):
            tile(f"{finetune[arm]['auc']:.3f}", name, f"on real {finetune['real']['auc']:.3f}")
    return tiles


def settings_of(records: Iterable[Figures]) -> list[dict[str, Any]]:
    """The settings that shaped each stage's result, as key and value."""
    return [{"stage": record["stage"], "settings": [(key, "none" if value is None else value) for key, value in
                                                    record["settings"].items() if key != "seed"]}
            for record in records]
