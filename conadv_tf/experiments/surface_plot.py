"""A picture of loss surfaces side by side; needs matplotlib (extra `plots`)."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from matplotlib import colors, ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

COLUMNS = 3
LEVELS = 13
PANEL_INCHES = 3.1


def plot(panels: Sequence[tuple[str, dict]], path: str) -> None:
    """Writes a PNG with one contour plot a panel, all with the same levels and axes.

    Args:
      panels: (title, {"axis": [n], "loss": [n][n] above 0}); see `analyze`.
      path: local or gs://.
    """
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(wspace=0.05)  # or tick labels of neighbours would meet
    figure = Figure((PANEL_INCHES * columns + 1.4, PANEL_INCHES * rows + 0.6), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    levels = _levels([surface["loss"] for _, surface in panels])
    for axis, (title, surface) in zip(axes, panels, strict=False):
        filled = _draw_contours(axis, title, surface, levels)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("along direction 1 (in norms of each filter)", fontsize=10)
    figure.supylabel("along direction 2 (in norms of each filter)", fontsize=10)
    bar = figure.colorbar(filled, ax=axes, ticks=levels[::2], format=ticker.FormatStrFormatter("%.3g"))
    bar.set_label("mean training loss (nats an image)")
    with tf.io.gfile.GFile(path, "wb") as file:
        figure.savefig(file, dpi=200, format="png")


def _levels(surfaces: list) -> np.ndarray:
    """The levels of all panels, from their lowest loss to their highest in equal ratios."""
    lowest, highest = np.min(surfaces), np.max(surfaces)
    return np.geomspace(lowest * 0.999, max(highest, 1.01 * lowest) * 1.001, LEVELS)


def _draw_contours(axis, title: str, surface: dict, levels: np.ndarray):
    places, losses = surface["axis"], surface["loss"]
    norm = colors.LogNorm(levels[0], levels[-1])
    filled = axis.contourf(places, places, losses, levels, norm=norm, cmap="viridis_r")
    # Lines and numbers as well: colours alone do not survive every printer.
    lines = axis.contour(places, places, losses, levels[1:-1], colors="black", linewidths=0.5)
    axis.clabel(lines, lines.levels[1::2], fmt="%.3g", fontsize=7)
    axis.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=2)
    axis.set_title(title, fontsize=9, parse_math=False)  # a folder's name may have $ in it
    axis.set_aspect("equal")
    axis.tick_params(labelbottom=True)  # there may be no panel below
    for coordinate in (axis.xaxis, axis.yaxis):
        coordinate.set_major_locator(ticker.MultipleLocator(places[-1] / 2))
    return filled
