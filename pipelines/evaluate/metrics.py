"""metrics.json of a run: every stage's figures under the stage's name, and the table shown at the end."""

from __future__ import annotations

from typing import Any

from pipelines.settings import Settings
from pipelines.stage import run_folder


def collect(settings: Settings) -> dict[str, dict[str, Any]]:
    """Metrics of all finished stages.  What is not known is absent."""
    records = {stage: (run_folder(settings) / stage).read_json("stage.json") for stage in settings.graph}
    return {stage: record["metrics"] for stage, record in records.items() if record}


def write_metrics(settings: Settings) -> None:
    (run_folder(settings) / "report").write_json("metrics.json", collect(settings))


def summary(settings: Settings) -> str:
    """The run's figures as a table for the terminal."""
    rows = [("stage", "seconds", "peak MiB", "figures")]
    for stage, metrics in collect(settings).items():
        shown = [f"{key} {_short(value)}" for key, value in _flat(metrics)
                 if key not in ("seconds", "peak_rss_mb")]
        rows.append((stage, _short(metrics["seconds"]), f"{metrics['peak_rss_mb']:.0f}", ", ".join(shown[:6])))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]])
             for row in rows]
    report = run_folder(settings) / "report"
    return "\n".join([*lines, "", f"report: {report.uri}/index.html"])


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [pair for key, value in metrics.items() for pair in (
        _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])]


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
