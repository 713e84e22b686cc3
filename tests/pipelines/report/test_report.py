"""The report stage on hand-made folders of a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from conftest import empty

from cluster.session import Resources
from pipelines.graph.plan import Plan
from pipelines.graph.stage import Stage, run_folder
from pipelines.report.report import report
from pipelines.report.summary import summary
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import write_shard
from pipelines.tables.schemas import CORPUS, IMAGES, QUARANTINE

HOSTILE = "<script>alert('x')</script>"
PICTURE = encode_png(np.full((8, 8), 90, np.uint8))["bytes"]
METRICS = {
    "ingest": {"images": 6, "quarantined": 1, "patients": 5, "splits": {"train": 4, "test": 2},
               "labels": {HOSTILE: 3}, "label_report": {"nih_cxr14": {"images": 6, "findings": {
                   HOSTILE: {"present": 3, "absent": 1234, "unknown": 2}}}}, "reasons": {"unreadable": 1},
               "images_per_second": 805.6},
    "autoencoder": {"psnr": 27.3},
    "encoder": {"dim": 32, "effective_rank": 9.5, "weights": "untrained"},
    "latents": {"images": 6, "images_per_second": 188.7},
    "train": {"images": 256, "images_per_second": 310.2, "data_wait_fraction": 0.004, "loss": 0.412,
              "ema_length": 0.05, "val_frechet_by_length": {"0.03": 2.5, "0.05": 1.5, "0.1": 1.75}},
    "sample": {"images": 3, "images_per_second": 8.31},
    "evaluate": {"extractor": "this run's encoder", "dim": 32, "n": 2, "reference": "test", "nearest_checked": 3,
                 "frechet": 1.5803, "frechet_floor": 0.2774, "copies": 0.0419, "copies_floor": 0.014,
                 "nearest_median": 0.73, "nearest_floor_median": 0.81,
                 "absent": {"precision, recall, density and coverage": "there are only 2 images"}},
    "finetune": {"target": HOSTILE, "real": {"auc": 0.952, "f1": 0.91, "accuracy": 0.9},
                 "synthetic": {"auc": 0.913, "f1": 0.86, "accuracy": 0.85}, "skipped": "mixed has one class"},
}


class Links(HTMLParser):
    """Collects the tags of a page and all that it would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "srcset", "action", "data")]


def write_stage(stage: Stage, name: str, metrics: dict) -> None:
    stage.input(name).write_json("stage.json", {
        "stage": name, "node": name, "settings": {"seed": 0, f"{name}.batch": 64}, "code": {"rayograph": "0.1.0"},
        "metrics": metrics | {"seconds": 12.5, "peak_rss_mb": 1077.6}})


@pytest.fixture
def stage(tiny) -> Stage:
    return Plan(tiny()).stage("report", Resources(2, 0, 2))


@pytest.fixture
def whole(stage) -> Stage:
    """The report stage of a run whose every other stage is done."""
    for name, metrics in METRICS.items():
        write_stage(stage, name, metrics)
    images = [{"image_id": f"i{k}", "image": encode_png(np.full((16, 16), 20 * k, np.uint8)),
               "split": "test" if k < 2 else "train"} for k in range(6)]
    write_shard(stage.input("ingest") / "images", 0, pa.Table.from_pylist(images, schema=IMAGES))
    refused = [{"uri": f"/data/{HOSTILE}.png", "stage": "ingest", "reason": "unreadable", "detail": "cut <b>off</b>"}]
    write_shard(stage.input("ingest") / "quarantine", 0, pa.Table.from_pylist(refused, schema=QUARANTINE))
    corpus = [{"image_id": f"s{k}", "image": encode_png(np.full((16, 16), 30 * k, np.uint8))} for k in range(3)]
    write_shard(stage.input("sample") / "corpus", 0, pa.Table.from_pylist(corpus, schema=CORPUS))
    for name in ("autoencoder", "encoder", "train"):
        entries = [{"images": 64 * k, "images_per_second": 70.0 + k, "loss": 1 / k} for k in range(1, 5)]
        stage.input(name).write("metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    for name, picture in (("autoencoder", "reconstructions"), ("evaluate", "nearest"), ("evaluate", "embedding")):
        stage.input(name).write(f"{picture}.png", PICTURE)
    return stage


def page_of(stage: Stage) -> str:
    return stage.folder.read("index.html").decode()


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_the_page_stands_alone(whole):
    metrics = report(whole)
    page = page_of(whole)
    found = Links()
    found.feed(page)
    assert metrics == {"bytes": len(page.encode()), "pictures": 9}
    assert len(found.links) == 9
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(found.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", page))
    assert whole.folder.names() == ["index.html", "metrics.json"]


def test_labels_and_file_names_are_escaped(whole):
    report(whole)
    page = page_of(whole)
    assert "<script" not in page
    assert "<b>off" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 2  # label and target
    assert HOSTILE not in page, "paths may name people"


def test_the_page_tells_the_run(whole):
    report(whole)
    text = text_of(page_of(whole))
    for told in ("run · Rayograph", "profile demo", "6 images of 5 patients", "part-00000.parquet, row 0",
                 "Fréchet distance 1.58", "real to real 0.277", "4.2% 1.4%", "real 0.952 0.910 0.900",
                 "Skipped: mixed has one class",
                 "Not measured: precision, recall, density and coverage; there are only 2 images",
                 "autoencoder 12.5 1,078 73 PSNR 27.3 dB", "ingest.batch 64", "rayograph run profile=demo",
                 "2 images drawn at random from the test split", "3 images drawn at random from the corpus"):
        assert told in text, told


def test_what_is_not_known_does_not_appear(whole):
    report(whole)
    text = text_of(page_of(whole))
    for absent in ("Precision", "MS-SSIM", "AUC trained on both", "None", "nan", "Undefined"):
        assert absent not in text, absent


def test_a_run_without_any_stage_still_has_a_page(stage):
    metrics = report(stage)
    assert metrics["pictures"] == 0
    text = text_of(page_of(stage))
    assert "Reproduce this run" in text
    for absent in ("Evaluation", "Images", "Classifiers", "Stages", "Training", "patients"):
        assert absent not in text, absent
    assert stage.folder.read_json("metrics.json") == {}


@pytest.mark.parametrize("left_out", sorted(METRICS))
def test_any_stage_may_be_missing(whole, left_out):
    empty(whole.input(left_out))
    report(whole)
    assert left_out not in whole.folder.read_json("metrics.json")


def test_no_classifier_is_told_with_its_reason(whole):
    write_stage(whole, "finetune", {"backbone": "scratch", "skipped": "the train split has no labels"})
    report(whole)
    text = text_of(page_of(whole))
    assert "Skipped: the train split has no labels" in text
    assert "AUC" not in text


def test_metrics_json_has_every_figure_of_every_stage(whole):
    report(whole)
    found = whole.folder.read_json("metrics.json")
    assert found == {name: metrics | {"seconds": 12.5, "peak_rss_mb": 1077.6} for name, metrics in METRICS.items()}


def test_summary_has_a_line_per_stage_and_the_path_of_the_report(whole):
    lines = summary(whole.settings).splitlines()
    assert [line.split()[0] for line in lines[1:9]] == list(METRICS)
    assert "Fréchet 1.58 (floor 0.277), copies 4.2% (floor 1.4%)" in summary(whole.settings)
    assert "AUC real 0.952, AUC synthetic 0.913" in summary(whole.settings)
    assert lines[-1] == f"report: {run_folder(whole.settings).uri}/report/index.html"
