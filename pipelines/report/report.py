"""Stage `report`: a self-contained HTML page, and metrics.json with the metrics of every node."""

from __future__ import annotations

import base64
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from cluster.storage import Folder
from pipelines.data.image.picture import DEFECTS, NOT_WANTED
from pipelines.graph.plan import code_version
from pipelines.graph.stage import Metrics, Stage, run_folder
from pipelines.monitor.journal import median_rate, read_journal
from pipelines.report import plots
from pipelines.report.summary import (
    classifiers,
    collect,
    evaluation,
    headline,
    settings_of,
    summary_of,
    write_metrics,
)
from pipelines.tables.draw import draw_rows
from pipelines.tables.images import decode_images
from pipelines.tables.parquet import read_shard

SHEET, COLUMNS = 32, 8
QUARANTINE_ROWS = 10
TRAINED = ("autoencoder", "encoder", "train")


@dataclass
class PageImage:
    """A PNG image on the page."""

    title: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def report(stage: Stage) -> Metrics:
    """Writes index.html and metrics.json.  Returns the page's size in bytes and its number of images."""
    sheets, figures, curves = list(contact_sheets(stage)), list(stored_images(stage)), list(training_curves(stage))
    page = render(stage, sheets, figures, curves).encode()
    stage.folder.write("index.html", page)
    write_metrics(stage.settings)
    return {"bytes": len(page), "pictures": len([*sheets, *figures, *curves])}


def render(stage: Stage, sheets: list[PageImage], figures: list[PageImage], curves: list[PageImage]) -> str:
    run, metrics = run_folder(stage.settings), collect(stage.settings)
    records = [record for node in metrics if (record := (run / node).read_json("stage.json"))]
    codes = [record["code"] for record in records] or [code_version()]

    def metrics_of(role: str) -> dict[str, Metrics]:
        return {node: metrics[node] for node in stage.needs[role] if node in metrics}

    def first(role: str) -> Metrics:
        return next(iter(metrics_of(role).values()), {})

    evaluated, tuned = metrics_of("evaluate"), metrics_of("finetune")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.j2").render(
        settings=stage.settings, data=ingested(stage), date=time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
        versions=sorted({" ".join(code.values()) for code in codes}),
        headline=headline(first("ingest"), first("autoencoder"), metrics_of("sample"), evaluated, tuned),
        ingest=first("ingest"), evaluated=evaluated, evaluation=evaluation(evaluated),
        tuned=tuned, classifiers=classifiers(tuned), sheets=sheets, figures=figures, plots=curves,
        stages=[stage_row(stage, node, values) for node, values in metrics.items()],
        quarantine=quarantined(stage), chosen=settings_of(records), command=command(stage),
    )


def ingested(stage: Stage) -> dict[str, Any]:
    """The data settings recorded by ingest; empty if it has not run."""
    record = stage.input("ingest").read_json("stage.json") or {}
    return {key: value for key, value in record.get("settings", {}).items() if key in ("data.source", "data.size")}


def stage_row(stage: Stage, node: str, metrics: Metrics) -> dict[str, Any]:
    """Seconds, peak memory, images/s (from the metrics, else the median of the journal) and summary of one node."""
    journal = read_journal(run_folder(stage.settings) / node)
    rate = metrics.get("images_per_second", median_rate(journal))
    spec = stage.settings.stages[stage.settings.graph[node].stage]
    return {"stage": node, "seconds": metrics["seconds"], "peak": metrics["peak_rss_mb"],
            "rate": "" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
            "summary": summary_of(spec, metrics)}


def quarantined(stage: Stage) -> list[dict[str, str]]:
    """Reason and location of the first rows of the quarantine; paths may name patients and are not shown."""
    folder = stage.input("ingest") / "quarantine"
    rows = ((reason, f"{name}, row {row}") for name in folder.names(".parquet")
            for row, reason in enumerate(read_shard(folder, name, ["reason"])["reason"].to_pylist()))
    return [{"reason": reason, "meaning": (DEFECTS | NOT_WANTED).get(reason, ""), "row": row}
            for reason, row in islice(rows, QUARANTINE_ROWS)]


def contact_sheets(stage: Stage) -> Iterator[PageImage]:
    """Contact sheets of random real test images and of random samples of each corpus."""
    tables: list[tuple[str, str, Folder, str | None]] = [
        ("Real", "drawn at random from the test split", stage.input("ingest") / "images", "test")]
    corpora = stage.inputs("sample")
    tables += [("Synthetic" if len(corpora) == 1 else node, "drawn at random from the corpus", folder / "corpus", None)
               for node, folder in corpora.items()]
    for title, caption, table, split in tables:
        if table.names(".parquet"):
            rows = draw_rows(table, SHEET, stage.seed, ["image"], split, by="source" if split else None)
            if rows.num_rows:
                yield PageImage(title, f"{rows.num_rows} images {caption}", plots.sheet(decode_images(rows), COLUMNS))


def stored_images(stage: Stage) -> Iterator[PageImage]:
    """The images stored by earlier stages."""
    for node, folder in stage.inputs("evaluate").items():
        suffix = f" · {node}" if len(stage.needs["evaluate"]) > 1 else ""
        yield from load_image(folder, "nearest.png", f"Closest to the training set{suffix}",
                          "The synthetic images nearest to any training image, each above that image. A pair that "
                          "shows the same patient would be a copy.")
        yield from load_image(folder, "embedding.png", f"Feature space{suffix}",
                          "Each point is an image. Blue areas without orange are missed by the generator; orange areas "
                          "without blue are unlike any real test image.")
    yield from load_image(stage.input("autoencoder"), "reconstructions.png", "Autoencoder",
                      "Test images above, their reconstructions below: samples cannot show more detail than these.")
    samples = stage.input("train") / "samples"
    for name in samples.names(".png")[-1:]:
        yield from load_image(samples, name, "Samples conditioned on held-out images",
                          "Images of the val split, decoded from their latents, and below each a sample conditioned on "
                          "it.")


def load_image(folder: Folder, name: str, title: str, caption: str) -> Iterator[PageImage]:
    if folder.exists(name):
        yield PageImage(title, caption, folder.read(name))


def training_curves(stage: Stage) -> Iterator[PageImage]:
    """Loss and speed of the trained stages, and how the generator's EMA was chosen."""
    for role in TRAINED:
        journal = read_journal(stage.input(role))
        if journal:
            held_out = read_journal(stage.input(role), "validation.jsonl")
            yield PageImage(role, f"up to {journal[-1]['images']:,} images, repeats counted",
                         plots.curves(journal, held_out))
    trained = (stage.input("train").read_json("stage.json") or {}).get("metrics", {})
    distances = trained.get("val_frechet_by_length", {})
    if len(distances) > 1:
        yield PageImage("EMA of the weights",
                        f"Distance of samples from val images by length; {trained['ema_length']:g} is exported",
                        plots.distances_by_length(distances, trained["ema_length"]))


def command(stage: Stage) -> str:
    """The command line that reproduces this run; if it was started from Python, its main settings.

    Paths are masked, since the page may be shared and folders may be named after archives and people.
    """
    from hydra.core.hydra_config import HydraConfig

    settings = stage.settings
    if HydraConfig.initialized():
        overrides = [re.sub(r"(?<=[=\[,:])\s*['\"]?(~|\.{0,2}/|\w+://).*", "PATH", override)
                     for override in HydraConfig.get().overrides.task]
    else:
        overrides = [f"profile={settings.profile}", f"name={settings.name}", f"seed={settings.seed}"]
    return shlex.join(["rayograph", "run", *overrides])
