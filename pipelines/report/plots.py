"""The pictures of a run, as PNG. Ink and ground are chosen to be read on white paper and on a dark screen alike."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

INK, REAL, SYNTHETIC = "#7f858c", "#3f87cf", "#e07a34"
TILE = 128  # pixels of a tile of a sheet, at most
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlecolor": INK, "grid.color": INK, "grid.alpha": 0.25, "axes.grid": True, "axes.grid.axis": "y",
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9, "axes.titlelocation":
    "left", "lines.linewidth": 1.6,
}


def sheet(images: np.ndarray, columns: int) -> bytes:
    """Contact sheet of uint8 (N, 1, H, W), on a transparent ground."""
    height, width = images.shape[2:]
    scale = min(1.0, TILE / max(height, width))
    side, gap = (round(width * scale), round(height * scale)), 3
    rows = -(-len(images) // columns)
    ground = Image.new("LA", (columns * (side[0] + gap) - gap, rows * (side[1] + gap) - gap), (0, 0))
    for k, image in enumerate(images):
        tile = Image.fromarray(image[0]).resize(side, Image.Resampling.LANCZOS)
        ground.paste(tile.convert("LA"), (k % columns * (side[0] + gap), k // columns * (side[1] + gap)))
    buffer = io.BytesIO()
    ground.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def curves(journal: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]] = ()) -> bytes:
    """Loss above images/s, over the images seen, of one stage's metrics.jsonl; and its loss on held-out images."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((4.2, 3.6), layout="constrained")
        for axes, key, label in zip(figure.subplots(2, 1, sharex=True), ("loss", "images_per_second"),
                                    ("loss", "images/s"), strict=True):
            known = [(entry["images"], entry[key]) for entry in journal if key in entry]
            if known:
                axes.plot(*zip(*known, strict=True), color=REAL, marker="o" if len(known) < 30 else "", markersize=2.5)
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
        return _png(figure)


def nearest(synthetic: np.ndarray, train: np.ndarray, distances: np.ndarray, columns: int = 6) -> bytes:
    """Synthetic images, each above its nearest training image, with the distance between their features.

    Args:
        synthetic: uint8 (N, 1, H, W).
        train: The same shape.
        distances: (N,) in feature units.
    """
    bands = -(-len(synthetic) // columns)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)  # pads in inches
        figure = Figure((1.45 * columns, 3.15 * bands), layout=layout)
        for band, part in enumerate(figure.subfigures(bands, 1, squeeze=False)[:, 0]):
            grid = part.subplots(2, columns)
            for column in range(columns):
                k = band * columns + column
                for row, images in enumerate((synthetic, train)):
                    axes = grid[row, column]
                    axes.set(xticks=[], yticks=[])
                    axes.spines[:].set_visible(False)
                    if k < len(images):
                        axes.imshow(images[k, 0], cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
                if k < len(distances):
                    grid[0, column].set_title(f"distance {distances[k]:.2f}", fontsize=11)
            for row, (name, color) in enumerate((("synthetic", SYNTHETIC), ("nearest train", REAL))):
                grid[row, 0].set_ylabel(name, color=color, fontsize=11)
        return _png(figure)


def scatter(real: np.ndarray, synthetic: np.ndarray) -> bytes:
    """Both sets of features (N, D) on the first two principal axes of the real one (2 or more rows)."""
    centre = real.mean(0)
    _, values, axes_of_real = np.linalg.svd(real - centre, full_matrices=False)
    share = values**2 / max((values**2).sum(), 1e-12)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure((5.0, 4.2), layout="constrained")
        axes = figure.subplots()
        for features, color, name in ((real, REAL, "real, test split"), (synthetic, SYNTHETIC, "synthetic")):
            x, y = axes_of_real[:2] @ (features - centre).T
            axes.scatter(x, y, s=12, color=color, alpha=0.6, linewidths=0, label=name)
        axes.set_xlabel(f"first principal axis of the real features ({share[0]:.0%} of their variance)")
        axes.set_ylabel(f"second ({share[1]:.0%})")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, markerscale=1.6)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
