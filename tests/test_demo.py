"""The demos whole, as `make demo` runs them: within their time, memory and distance from real images."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from test_run import RAYOGRAPH

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(7200)]


def demo(storage: Path, *overrides: str) -> tuple[dict, float]:
    """metrics.json and the seconds of one demo, after which the same command has nothing to do."""
    arguments = [str(RAYOGRAPH), "run", "profile=demo", f"storage={storage}", "name=demo", *overrides]
    start = time.monotonic()
    subprocess.run(arguments, check=True)
    seconds = time.monotonic() - start
    again = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=20)
    assert "nothing to do" in again.stdout
    metrics = json.loads((storage / "demo" / "report" / "metrics.json").read_text())
    assert max(stage["peak_rss_mb"] for stage in metrics.values()) < 6 * 1024
    evaluated = metrics["evaluate"]
    assert evaluated["frechet"] < 4 * evaluated["frechet_floor"]
    for metric in ("recall", "coverage"):
        assert evaluated[metric] > evaluated[f"{metric}_floor"] - 0.05, metric
    assert evaluated["detail"] > -4, "dB"
    return metrics, seconds


def test_the_phantom_demo_ends_in_minutes(tmp_path):
    _, seconds = demo(tmp_path)
    assert seconds < 10 * 60


def test_on_real_radiographs_the_corpus_teaches_what_the_films_teach(tmp_path, real_data):
    metrics, seconds = demo(tmp_path, "data=folder", f"data.root={real_data('kermany')}")
    assert seconds < 30 * 60
    assert metrics["autoencoder"]["psnr"] > 25.4
    assert metrics["finetune"]["real"]["auc"] > 0.985
    assert metrics["finetune"]["synthetic"]["auc"] >= 0.975
    assert metrics["finetune"]["mixed"]["auc"] > 0.985
