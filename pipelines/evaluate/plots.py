"""Figures of the evaluation, as PNG. Colours are readable on a white page and on a dark screen."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, REAL, SYNTHETIC = "#7f858c", "#3f87cf", "#e07a34"
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlecolor": INK, "grid.color": INK, "grid.alpha": 0.25, "axes.grid": True, "axes.grid.axis": "y",
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9, "axes.titlelocation":
    "left", "lines.linewidth": 1.6,
}


def nearest(synthetic: np.ndarray, train: np.ndarray, distances: np.ndarray, columns: int = 6) -> bytes:
    """Synthetic images, each above its nearest training image, with the distance between their features.

    Args:
        synthetic: uint8 (N, 1, H, W).
        train: their nearest training images, of the same shape.
        distances: (N,) in feature units.
    """
    bands = -(-len(synthetic) // columns)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)  # pads in inches
        figure = Figure((1.45 * columns, 3.15 * bands), layout=layout)
        for band, subfigure in enumerate(figure.subfigures(bands, 1, squeeze=False)[:, 0]):
            grid = subfigure.subplots(2, columns)
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
        return to_png(figure)


def scatter(real: np.ndarray, synthetic: np.ndarray) -> bytes:
    """Both sets of features (N, D), projected on the first two principal axes of the real one (2 or more rows)."""
    centre = real.mean(0)
    _, values, real_axes = np.linalg.svd(real - centre, full_matrices=False)
    explained = values**2 / max((values**2).sum(), 1e-12)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure((5.0, 4.2), layout="constrained")
        axes = figure.subplots()
        for features, color, name in ((real, REAL, "real, test split"), (synthetic, SYNTHETIC, "synthetic")):
            x, y = real_axes[:2] @ (features - centre).T
            axes.scatter(x, y, s=12, color=color, alpha=0.6, linewidths=0, label=name)
        axes.set_xlabel(f"first principal axis of the real features ({explained[0]:.0%} of their variance)")
        axes.set_ylabel(f"second ({explained[1]:.0%})")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, markerscale=1.6)
        return to_png(figure)


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
