"""Stage `report`: one HTML page that stands alone, and metrics.json with every stage's figures."""

from __future__ import annotations

import base64
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cluster.storage import Folder
from pipelines.data.tables import read_shard, read_table
from pipelines.evaluate import figures
from pipelines.evaluate.metrics import (
    collect,
    evaluation,
    figures_of,
    finetuning,
    headline,
    settings_of,
    write_metrics,
)
from pipelines.progress import read_journal
from pipelines.settings import Settings
from pipelines.stage import Metrics, Stage, code_version, run_folder

SHEET, COLUMNS = 32, 8
QUARANTINE_ROWS = 10
TRAINED = ("autoencoder", "encoder", "train")


@dataclass
class Picture:
    """A PNG of the page."""

    title: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def report(stage: Stage) -> Metrics:
    """Writes index.html and metrics.json.  Returns the page's size in bytes and its number of pictures."""
    settings = stage.settings
    sheets, drawn, plots = (list(found) for found in (sheets_of(settings), drawn_of(settings), curves_of(settings)))
    page = render(settings, sheets, drawn, plots).encode()
    stage.folder.write("index.html", page)
    write_metrics(settings)
    return {"bytes": len(page), "pictures": len([*sheets, *drawn, *plots])}


def render(settings: Settings, sheets: list[Picture], drawn: list[Picture], plots: list[Picture]) -> str:
    """The page.  All text is escaped: labels and file names are whatever a data set holds."""
    run = run_folder(settings)
    metrics = {name: found for name, found in collect(settings).items() if name not in ("report", "publish")}
    records = [record for name in metrics if (record := (run / name).read_json("stage.json"))]
    codes = [record["code"] for record in records] or [code_version()]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        settings=settings, date=time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
        versions=sorted({" ".join(code.values()) for code in codes}),
        metrics=metrics, headline=headline(metrics), evaluation=evaluation(metrics.get("evaluate", {})),
        finetuning=finetuning(metrics.get("finetune", {})),
        sheets=sheets, drawn=drawn, plots=plots,
        stages=[stage_row(run, name, found) for name, found in metrics.items()],
        quarantine=quarantined(settings), chosen=settings_of(records), command=command(settings),
    )


def stage_row(run: Folder, stage: str, metrics: Metrics) -> dict[str, Any]:
    """Seconds, peak memory, images/s (the journal's median where the stage gives none) and figures of one stage."""
    rates = sorted(entry["images_per_second"] for entry in read_journal(run / stage))
    rate = metrics.get("images_per_second", rates[len(rates) // 2] if rates else None)
    return {"stage": stage, "seconds": metrics["seconds"], "peak": metrics["peak_rss_mb"],
            "rate": "" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
            "figures": figures_of(stage, metrics)}


def quarantined(settings: Settings) -> list[dict[str, str]]:
    """The first rows of the quarantine, with paths from data.root on."""
    folder, root = run_folder(settings) / "ingest" / "quarantine", f"{settings.data.root}/"
    rows = (row for name in folder.names(".parquet") for row in read_shard(folder, name).to_pylist())
    return [{key: str(value).replace(root, "") for key, value in row.items()} for row in islice(rows, QUARANTINE_ROWS)]


def sheets_of(settings: Settings) -> Iterator[Picture]:
    """Contact sheets of random real test images and random samples."""
    run = run_folder(settings)
    for title, caption, table, split in (
        ("Real", "drawn at random from the test split", run / "ingest" / "images", "test"),
        ("Synthetic", "drawn at random from the corpus", run / "sample" / "corpus", None),
    ):
        if table.names(".parquet"):
            ids = read_table(table, ["image_id"], split)["image_id"].to_pylist()
            chosen = np.random.default_rng(settings.seed).permutation(len(ids))[:SHEET]
            if len(chosen):
                images = figures.images_of(table, [ids[row] for row in chosen])
                yield Picture(title, f"{len(chosen)} images {caption}", figures.sheet(images, COLUMNS))


def drawn_of(settings: Settings) -> Iterator[Picture]:
    """The pictures that earlier stages left."""
    samples = (run_folder(settings) / "train" / "samples").names(".png")
    return stored(run_folder(settings), (
        ("evaluate", "nearest.png", "Closest to the training set",
         "The synthetic images nearest to any training image, each above that image. A pair that shows the same "
         "patient would be a copy."),
        ("evaluate", "embedding.png", "Feature space",
         "Each point is an image. Blue without orange is missed by the generator; orange without blue is unlike any "
         "real test image."),
        ("autoencoder", "reconstructions.png", "Autoencoder",
         "Test images above, their reconstructions below: the detail that no sample can exceed."),
        *(("train/samples", name, "Around held-out images",
           "Images of the val split as the autoencoder shows them, and below each a sample conditioned on it.")
          for name in samples[-1:]),
    ))


def stored(run: Folder, pictures: Iterable[tuple[str, str, str, str]]) -> Iterator[Picture]:
    for stage, name, title, caption in pictures:
        if (run / stage).exists(name):
            yield Picture(title, caption, (run / stage).read(name))


def curves_of(settings: Settings) -> Iterator[Picture]:
    """Loss and speed of the stages that train."""
    for stage in TRAINED:
        journal = read_journal(run_folder(settings) / stage)
        if journal:
            held_out = read_journal(run_folder(settings) / stage, "validation.jsonl")
            yield Picture(stage, f"up to {journal[-1]['images']:,} images, repeats counted",
                          figures.curves(journal, held_out))


def command(settings: Settings) -> str:
    """The command line that makes this run: as it was given, or, called from Python, its main settings."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        overrides = list(HydraConfig.get().overrides.task)
    else:
        data = [f"data={settings.data.source}"] + ([f"data.root={settings.data.root}"] if settings.data.root else [])
        overrides = [f"profile={settings.profile}", *data, f"name={settings.name}", f"seed={settings.seed}"]
    return shlex.join(["rayograph", "run", *overrides])
