"""metrics.json of a run: every stage's figures under the stage's name, and the table shown at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pipelines.settings import Settings
from pipelines.stage import run_folder

FIGURES = {  # per stage, the figures that sum it up; one whose value is not known is left out
    "ingest": ("{images:,} images", "{quarantined:,} in quarantine", "{images_per_second:,.0f} images/s"),
    "autoencoder": ("PSNR {psnr:.1f} dB",),
    "encoder": ("{dim}-d", "effective rank {effective_rank:.1f}", "k-NN AUC {knn_auc:.3f}"),
    "latents": ("{images:,} images", "{images_per_second:,.0f} images/s"),
    "train": ("{images:,} images", "loss {loss:.4g}", "{images_per_second:,.0f} images/s",
              "waits for data {data_wait_fraction:.1%}"),
    "sample": ("{images:,} images", "{images_per_second:,.3g} images/s"),
    "evaluate": ("Fréchet {frechet:.3g} (floor {frechet_floor:.3g})",
                 "coverage {coverage:.2f} (floor {coverage_floor:.2f})",
                 "copies {copies:.1%} (floor {copies_floor:.1%})"),
    "finetune": ("AUC real {real[auc]:.3f}", "synthetic {synthetic[auc]:.3f}", "mixed {mixed[auc]:.3f}"),
    "report": ("{pictures} pictures", "{bytes:,} bytes"),
}


def collect(settings: Settings) -> dict[str, dict[str, Any]]:
    """Metrics of all finished stages.  What is not known is absent."""
    records = {stage: (run_folder(settings) / stage).read_json("stage.json") for stage in settings.graph}
    return {stage: record["metrics"] for stage, record in records.items() if record}


def write_metrics(settings: Settings) -> None:
    (run_folder(settings) / "report").write_json("metrics.json", collect(settings))


def figures_of(stage: str, metrics: Mapping[str, Any]) -> str:
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
