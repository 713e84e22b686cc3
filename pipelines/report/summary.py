"""Metrics of a run, by node of its graph: metrics.json, the table on the terminal, the rows of the report's tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.graph.settings import Settings, StageSpec
from pipelines.graph.stage import run_folder

StageMetrics = Mapping[str, Any]

EVALUATION = (  # metric, its floor, format, name, better direction, meaning
    ("frechet", "frechet_floor", ".3g", "Fréchet distance", "lower",
     "Squared distance between Gaussians fitted to the features of the two sets; 0 when they are equal."),
    ("precision", "precision_floor", ".3f", "Precision", "higher",
     "Share of synthetic images inside the real distribution: fidelity."),
    ("recall", "recall_floor", ".3f", "Recall", "higher",
     "Share of real images inside the synthetic distribution: diversity."),
    ("density", "density_floor", ".3f", "Density", "higher",
     "Mean number of real neighbourhoods around a synthetic image, relative to k; about 1 for real images."),
    ("coverage", "coverage_floor", ".3f", "Coverage", "higher",
     "Share of real images with a synthetic one in their neighbourhood."),
    ("ms_ssim", "ms_ssim_floor", ".3f", "MS-SSIM within the set", "near the floor",
     "Structural similarity of random pairs; far above the floor, images are too similar (mode collapse)."),
    ("spectrum_error", "spectrum_error_floor", ".2f", "Power spectrum, error in dB", "near the floor",
     "Difference from the spectrum of the real images over all frequencies; 0 when they are equal."),
    ("detail", "detail_floor", "+.2f", "Power of fine detail in dB", "near 0",
     "Of the upper half of the frequencies, against the real images; below 0 the synthetic ones are smoother."),
    ("nearest_median", "nearest_floor_median", ".3g", "Distance to the nearest training image, median",
     "near the floor", "In feature units; far below the floor, the generator repeats its training set."),
    ("copies", "copies_floor", ".1%", "Unusually close to a training image", "near the floor",
     "Share of synthetic images nearer to a training image than 99% of the real test images are."),
)

SCORES = ("auc", "f1", "accuracy")


def collect(settings: Settings) -> dict[str, dict[str, Any]]:
    """Metrics of all finished nodes of the graph."""
    records = {node: (run_folder(settings) / node).read_json("stage.json") for node in settings.graph}
    return {node: record["metrics"] for node, record in records.items() if record}


def write_metrics(settings: Settings) -> None:
    """Write report/metrics.json, if the graph has a report."""
    for node in settings.nodes("report"):
        (run_folder(settings) / node).write_json("metrics.json", collect(settings))


def summary_of(spec: StageSpec, metrics: StageMetrics) -> str:
    """The metrics that summarise a stage, in words; unknown ones are omitted."""
    phrases = []
    for template in spec.figures:
        with contextlib.suppress(KeyError):
            phrases.append(template.format_map(metrics))
    return ", ".join(phrases)


def summary(settings: Settings) -> str:
    """The run's metrics as a table for the terminal."""
    rows = [("stage", "seconds", "peak MiB", "metrics")]
    rows += [(node, f"{metrics['seconds']:,.1f}", f"{metrics['peak_rss_mb']:,.0f}",
              summary_of(settings.stages[settings.graph[node].stage], metrics))
             for node, metrics in collect(settings).items()]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = [f"{node:<{widths[0]}}  {seconds:>{widths[1]}}  {peak:>{widths[2]}}  {phrases}".rstrip()
             for node, seconds, peak, phrases in rows]
    reports = [f"report: {(run_folder(settings) / node).uri}/index.html" for node in settings.nodes("report")]
    return "\n".join([*lines, "", *reports])


def evaluation(nodes: Mapping[str, StageMetrics]) -> list[dict[str, Any]]:
    """Rows of the evaluation table, for the metrics that were measured; a cell with value and floor for each node."""
    return [{"name": name, "better": better, "meaning": meaning, "cells": [
                {"value": format(metrics[key], shape) if key in metrics else "",
                 "floor": format(metrics[floor], shape) if floor in metrics else ""} for metrics in nodes.values()]}
            for key, floor, shape, name, better, meaning in EVALUATION
            if any(key in metrics for metrics in nodes.values())]


def classifiers(nodes: Mapping[str, StageMetrics]) -> list[dict[str, str]]:
    """Rows of the classifiers' table: node, training data and scores."""
    return [{"node": node, "trained_on": arm} |
            {score: f"{scores[score]:.3f}" if score in scores else "" for score in SCORES}
            for node, metrics in nodes.items() for arm, scores in metrics.items()
            if isinstance(scores, Mapping) and "auc" in scores]


def headline(ingest: StageMetrics, autoencoder: StageMetrics, corpora: Mapping[str, StageMetrics],
             evaluated: Mapping[str, StageMetrics], tuned: Mapping[str, StageMetrics]) -> list[dict[str, str]]:
    """The key metrics at the top of the page: value, name, and reference value."""
    tiles = []

    def tile(value: str, name: str, *reference: str) -> None:
        tiles.append({"value": value, "name": name, "reference": ", ".join(filter(None, reference))})

    def node_name(node: str, nodes: Mapping[str, StageMetrics]) -> str:
        return node if len(nodes) > 1 else ""

    if "images" in ingest:
        tile(f"{ingest['images']:,}", "real images", f"{ingest['quarantined']:,} in quarantine")
    for node, metrics in corpora.items():
        if "images" in metrics:
            tile(f"{metrics['images']:,}", "synthetic images", node_name(node, corpora))
    if "psnr" in autoencoder:
        tile(f"{autoencoder['psnr']:.1f} dB", "autoencoder PSNR", "on the test split")
    for node, metrics in evaluated.items():
        for key, name, shape in (("frechet", "Fréchet distance", ".3g"), ("coverage", "coverage", ".2f"),
                                 ("copies", "unusually close to train", ".1%")):
            if key in metrics:
                tile(format(metrics[key], shape), name, f"real to real {metrics[f'{key}_floor']:{shape}}",
                     node_name(node, evaluated))
    for node, metrics in tuned.items():
        for arm, scores in metrics.items():
            if arm != "real" and isinstance(scores, Mapping) and "auc" in scores and "auc" in metrics.get("real", {}):
                tile(f"{scores['auc']:.3f}", f"AUC trained on {arm}", f"on real {metrics['real']['auc']:.3f}",
                     node_name(node, tuned))
    return tiles


def settings_of(records: Iterable[StageMetrics]) -> list[dict[str, Any]]:
    """The settings that determine each node's result, as key and value."""
    return [{"stage": record["node"], "settings": [(key, "none" if value is None else value) for key, value in
                                                   record["settings"].items() if key != "seed"]}
            for record in records]
