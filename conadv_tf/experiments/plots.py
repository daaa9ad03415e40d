"""Plots of tables and figures, readable in print without colour.

    by_batch         a table of methods by batch size: measured, the paper's, estimated
    by_column        a table whose columns are numbers, such as epsilon or the delay
    gaps             training accuracy, test accuracy, and the gap between them
    training_curves  accuracy over the epochs
    figure4          throughput over batch sizes

Every curve has a marker and dashes as well as a colour. All of them need matplotlib, and raise ConfigError without it.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from conadv_tf.errors import ConfigError
from conadv_tf.experiments import labels, paper
from conadv_tf.experiments.figure4 import PANELS, K, Point
from conadv_tf.experiments.study import METHOD_ROWS, Group
from conadv_tf.experiments.tables import Line, Table
from conadv_tf.preflight.tpu_generations import Generation

# Colour, marker and dashes by the label of a table's line.
TABLE_STYLES = {
    METHOD_ROWS["vanilla"].label: ("#444444", "o", "-"),
    METHOD_ROWS["aa"].label: ("#8a5fa8", "P", ":"),
    METHOD_ROWS["disadv"].label: ("#b5402a", "s", "-"),
    METHOD_ROWS["conadv"].label: ("#c78a1b", "^", "--"),
    METHOD_ROWS["paired"].label: ("#2b6ca3", "D", "-"),
    METHOD_ROWS["paired_predicted"].label: ("#1f9aa3", "d", "-"),
    METHOD_ROWS["paired_predicted_aa"].label: ("#145f66", "h", "-."),
    METHOD_ROWS["paired_target"].label: ("#6f9fd0", "<", "--"),
    METHOD_ROWS["conadv_predicted"].label: ("#a0741a", ">", ":"),
    METHOD_ROWS["noise"].label: ("#999999", "x", "--"),
    METHOD_ROWS["sam"].label: ("#a83279", "*", "-"),
    METHOD_ROWS["sam_stale"].label: ("#d07fb0", "p", "--"),
    METHOD_ROWS["conadv_aa"].label: ("#2f7d4f", "v", "-."),
}
# Two of ConAdv's schedules, by their labels in estimates.
TABLE_STYLES["+ ConAdv, shadow"] = TABLE_STYLES[METHOD_ROWS["conadv"].label]
TABLE_STYLES["+ ConAdv, phased"] = "#7a7a2b", "X", ":"
# Colour, marker and dashes by the kind of a method, for Figure 4.
FIGURE4_STYLES = {
    "vanilla": ("#444444", "o", "-"),
    "disadv": ("#b5402a", "s", "-"),
    "shadow": ("#c78a1b", "^", "--"),
    "paired": ("#2b6ca3", "D", "-"),
    "phased": ("#2f7d4f", "v", "-"),
}
FIGURE4_PAPER_MARKERS = {"vanilla": "o", "disadv": "s", "conadv": "*"}
PANEL_INCHES = 3.6, 3.1
BATCH_AXIS = "batch size on ImageNet, or its scale model"

Curve = dict[str, tuple[float, float]]  # mean and spread by column


def load_pyplot():
    """Gives matplotlib.pyplot, drawing to files. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib, which is not installed: pip install 'conadv_tf[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _figure(columns: int, rows: int = 1):
    """Gives (pyplot, figure, axes [rows, columns]) for panels in rows and columns."""
    pyplot = load_pyplot()
    size = columns * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 0.5
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    return pyplot, figure, axes


def _save(pyplot, figure, path: str) -> None:
    """Writes the figure with a grid, and one legend below all panels."""
    for axis in figure.axes:
        axis.grid(linewidth=0.4, alpha=0.6)
    _add_legend(figure, columns=3)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def _add_legend(figure, columns: int) -> None:
    """Adds one legend for all panels, below them; a name that several panels have stands there once."""
    handles_of: dict[str, Any] = {}
    for axis in figure.axes:
        handles, names = axis.get_legend_handles_labels()
        handles_of |= dict(zip(names, handles, strict=True))
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
    figure.legend(handles_of.values(), handles_of.keys(), **place)


def by_batch(table: Table, path: str, unit: str) -> None:
    """Draws a table of methods by batch size: a panel each for measured numbers, the paper's, and estimates."""
    of_mean = any(number.of_mean for line in table.lines for number in line.measured.values())
    panels: dict[str, dict[str, Curve]] = {
        f"measured, mean ± {'s.e.' if of_mean else 's.d.'}": {},
        "paper: ResNet-50, ImageNet": {},
        "estimated": {},
    }
    measured, reported, estimated = panels.values()
    for line in table.lines:
        is_estimate = not any(number.group for number in line.measured.values())
        (estimated if is_estimate else measured)[line.label.removesuffix(", estimate")] = _measured(line)
        reported[line.label] = {column: (value, 0.0) for column, value in line.paper.items()}
    drawn = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not drawn:
        return
    pyplot, figure, axes = _figure(len(drawn))
    for axis, (title, curves) in zip(axes[0], drawn.items(), strict=True):
        _draw_curves(axis, [column for column in paper.BATCHES if column in table.columns], curves)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(BATCH_AXIS, fontsize=9)
        axis.set_ylabel(unit)
    _save(pyplot, figure, path)


def _measured(line: Line) -> Curve:
    found = {column: number for column, number in line.measured.items() if number.values}
    return {column: (statistics.mean(number.values), number.spread) for column, number in found.items()}


def _draw_curves(axis, columns: Sequence[str], curves: dict[str, Curve]) -> None:
    curves = {label: curve for label, curve in curves.items() if curve}
    for number, (label, curve) in enumerate(curves.items()):
        colour, marker, dashes = TABLE_STYLES[label]
        style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 5, "capsize": 3}
        aside = 0.06 * (number - (len(curves) - 1) / 2)  # so that no bar hides another
        places = [columns.index(column) + aside for column in curve]
        axis.errorbar(places, *zip(*curve.values(), strict=True), label=label, **style)
    axis.set_xticks(range(len(columns)), columns)


def by_column(table: Table, path: str, unit: str) -> None:
    """Draws a table whose columns are numbers: a panel a line, with the paper's curve on an axis of its own."""
    pyplot, figure, axes = _figure(min(3, len(table.lines)), -(-len(table.lines) // 3))
    for axis, line in zip(axes.flat, table.lines, strict=False):
        _draw_beside_paper(axis, table, line)
        axis.set_xlabel(table.corner)
        axis.set_ylabel(unit)
    for axis in list(axes.flat)[len(table.lines) :]:
        axis.set_visible(False)
    _save(pyplot, figure, path)


def _draw_beside_paper(axis, table: Table, line: Line) -> None:
    curve = _measured(line)
    style = {"color": "#2b6ca3", "marker": "D", "markersize": 4, "capsize": 3, "label": "measured, mean ± s.d."}
    if curve:
        axis.errorbar([float(column) for column in curve], *zip(*curve.values(), strict=True), **style)
    axis.set_title(line.label, fontsize=10)
    if line.paper:
        other = axis.twinx()
        columns = [column for column in table.columns if column in line.paper]
        style = {"color": "#444444", "marker": "*", "linestyle": ":"}
        other.plot([float(c) for c in columns], [line.paper[c] for c in columns], label="paper (right axis)", **style)
        other.grid(False)


def by_line(table: Table, path: str, column: str, unit: str) -> None:
    """Draws one column of a table, a place a line."""
    found = [(line.label, curve[column]) for line in table.lines if column in (curve := _measured(line))]
    if not found:
        return
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(2 * PANEL_INCHES[0], 0.45 * len(found) + 1.0), layout="constrained")
    for place, (label, (mean, spread)) in enumerate(found):
        colour, marker, _ = TABLE_STYLES[label]
        axis.errorbar(mean, -place, xerr=spread, color=colour, marker=marker, markersize=6, capsize=3)
    axis.set_yticks([-place for place in range(len(found))], [label for label, _ in found])
    axis.axvline(0.0, color="#444444", linewidth=0.8)
    axis.set_xlabel(unit)
    _save(pyplot, figure, path)


def gaps(table: Table, path: str, columns: str = BATCH_AXIS) -> None:
    """Draws a panel each for training accuracy, test accuracy and their gap, over what `columns` names."""
    pyplot, figure, axes = _figure(3)
    for axis, part in zip(axes[0], ("training", "test", "gap"), strict=True):
        parts = [(line, *line.label.rpartition(", ")) for line in table.lines]
        _draw_curves(axis, table.columns, {label: _measured(line) for line, label, _, own in parts if own == part})
        axis.set_title(f"{part}, {'points' if part == 'gap' else 'top-1, %'}", fontsize=10)
        axis.set_xlabel(columns, fontsize=9)
    _save(pyplot, figure, path)


def training_curves(table: Table, path: str, curves: Callable[[Group], list[list[dict]]]) -> None:
    """Draws accuracy over the epochs, a panel a batch size: training images of the epoch, test images where evaluated.

    `curves` gives the epochs of every run of a group (callbacks.Recorder); the runs' mean is drawn.
    """
    found = {
        column: {line.label: curves(group) for line in table.lines if (group := line.measured[column].group)}
        for column in table.columns
    }
    panels = {batch: {label: seeds for label, seeds in of.items() if seeds} for batch, of in found.items()}
    panels = {batch: of for batch, of in panels.items() if of}
    if not panels:
        return
    pyplot, figure, axes = _figure(min(3, len(panels)), -(-len(panels) // 3))
    for axis, (batch, seeds_of) in zip(axes.flat, panels.items(), strict=False):
        for label, seeds in seeds_of.items():
            colour, marker, dashes = TABLE_STYLES[label]
            axis.plot(*_mean_curve(seeds, "clean_top1"), color=colour, linestyle=dashes, linewidth=1)
            axis.plot(*_mean_curve(seeds, "test_top1"), marker, color=colour, markersize=6, label=label)
        axis.set_title(f"batch {batch}: training (lines), test (markers)", fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylabel("top-1, %")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    _save(pyplot, figure, path)


def _mean_curve(seeds: Sequence[list[dict]], name: str) -> tuple[list[int], list[float]]:
    """The mean of the value `name` at the epochs that every seed has, in percent."""
    found = [{line["epoch"]: line[name] for line in lines if name in line} for lines in seeds]
    epochs = sorted(set.intersection(*map(set, found)))
    return epochs, [100 * statistics.mean(values[epoch] for values in found) for epoch in epochs]


def figure4(found: list[Point], generation: Generation, path: str) -> None:
    """Draws both panels of Figure 4, and the paper's numbers in them."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), width_ratios=(3, 2), layout="constrained")
    for axis, panel in zip(axes, PANELS, strict=True):
        _draw_throughput(axis, panel, found)
        _draw_paper_throughput(axis, panel)
        _scale_throughput_axes(axis, PANELS[panel][1])
        axis.set_title(f"({panel}) {PANELS[panel][0]} images per {generation.unit}", fontsize=11)
    _add_legend(figure, columns=4)
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def _draw_throughput(axis, panel: str, found: list[Point]) -> None:
    for name, (colour, marker, dashes) in FIGURE4_STYLES.items():
        own = [point for point in found if (point.panel, point.method) == (panel, name)]
        # DisAdv and shadow all but coincide: one hollow around the other.
        size, fill = (8, "none") if name == "disadv" else (5, "full")
        style = {"color": colour, "marker": marker, "markersize": size, "fillstyle": fill}
        batches, values = [point.batch for point in own], [point.images_per_ms for point in own]
        axis.plot(batches, values, dashes, label=labels.FIGURE4[name], **style)


def _draw_paper_throughput(axis, panel: str) -> None:
    for name, marker in FIGURE4_PAPER_MARKERS.items():
        reported = [(batch, values[name]) for batch, values in paper.FIGURE4[panel].items() if name in values]
        if reported:
            style = {"color": "none", "markeredgecolor": "black", "markersize": 10}
            label = f"paper: {labels.FIGURE4.get(name, 'ConAdv')}"
            axis.plot(*zip(*reported, strict=True), marker, label=label, **style)


def _scale_throughput_axes(axis, batches: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(batches))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / K:g}k" if value >= K else f"{value:g}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("batch size (clean images)")
    axis.set_ylabel("throughput (clean images / ms)")
    axis.grid(which="major", linewidth=0.4, alpha=0.6)
