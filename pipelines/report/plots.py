"""Contact sheets and training curves of the report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from pipelines.evaluate.plots import REAL, STYLE, SYNTHETIC, to_png

TILE = 128  # largest side of a contact sheet's tile, in pixels


def sheet(images: np.ndarray, columns: int) -> bytes:
    """Contact sheet of uint8 images (N, 1, H, W), on a transparent background."""
    height, width = images.shape[2:]
    scale = min(1.0, TILE / max(height, width))
    side, gap = (round(width * scale), round(height * scale)), 3
    rows = -(-len(images) // columns)
    canvas = Image.new("LA", (columns * (side[0] + gap) - gap, rows * (side[1] + gap) - gap), (0, 0))
    for k, image in enumerate(images):
        tile = Image.fromarray(image[0]).resize(side, Image.Resampling.LANCZOS)
        canvas.paste(tile.convert("LA"), (k % columns * (side[0] + gap), k // columns * (side[1] + gap)))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def curves(journal: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]] = ()) -> bytes:
    """Loss and images/s over the images seen, from a stage's metrics.jsonl, and its loss on held-out images."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((4.2, 3.6), layout="constrained")
        for axes, key, label in zip(figure.subplots(2, 1, sharex=True), ("loss", "images_per_second"),
                                    ("loss", "images/s"), strict=True):
            points = [(entry["images"], entry[key]) for entry in journal if key in entry]
            if points:
                marker = "o" if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), color=REAL, marker=marker, markersize=2.5)
            if key == "loss" and held_out:
                seen, losses = zip(*((entry["images"], entry["val_loss"]) for entry in held_out), strict=True)
                axes.plot(seen, losses, color=SYNTHETIC, marker="o", markersize=2.5, label="held out")
                axes.legend(frameon=False)
            axes.set_title(label)
            if key == "images_per_second":
                axes.set_ylim(bottom=0)
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return to_png(figure)


def distances_by_length(distances: Mapping[str, float], exported: float) -> bytes:
    """Fréchet distances of EMAs, by their length; the exported one is marked."""
    lengths = list(map(float, distances))
    with matplotlib.rc_context(STYLE):
        figure = Figure((4.2, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(lengths, list(distances.values()), color=REAL, marker="o", markersize=3)
        axes.plot(exported, distances[f"{exported:g}"], color=SYNTHETIC, marker="o", markersize=7)
        axes.set_xscale("log")
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title("Fréchet distance")
        axes.set_xlabel("length, as a fraction of the images seen")
        return to_png(figure)
